"""In the request's own thread: a request -> one Observation."""
