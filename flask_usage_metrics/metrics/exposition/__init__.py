"""Totals -> bytes of a scrape, in each format."""
