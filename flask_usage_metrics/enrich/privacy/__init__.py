"""Privacy: decides what is kept of a request, and replaces secrets."""
