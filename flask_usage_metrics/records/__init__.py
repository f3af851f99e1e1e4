"""The values that travel between rooms: observations, records, and the read API's values."""
