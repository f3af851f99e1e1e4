"""Knows how a Flask app is used."""
