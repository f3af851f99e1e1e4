"""Storages."""
