"""The values that travel: an observation, the record made of it, what is read of records."""
