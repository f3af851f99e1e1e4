"""From the worker into one storage, through whatever outage."""
