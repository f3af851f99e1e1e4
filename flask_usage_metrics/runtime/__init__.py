"""What all else stands on: files of our own, processes, forks, failures, the interpreter."""
