"""Sees each request in the thread that answers it: one request -> one Observation."""
