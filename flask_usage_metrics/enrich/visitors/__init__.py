"""Visitors: told apart for a day without a cookie, and counted."""
