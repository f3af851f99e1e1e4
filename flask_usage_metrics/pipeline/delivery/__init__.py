"""From the worker into one storage: queue, spool on disk, retries; each record is accounted for."""
