"""Records -> totals -> what a scrape shows."""
