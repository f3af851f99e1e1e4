"""The ground floor: private files, processes, forks, failures, caches, the interpreter lock."""
