"""From the request's thread to every sink: journal, worker, delivery."""
