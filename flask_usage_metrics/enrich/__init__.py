"""In the worker: an Observation -> the UsageRecord."""
