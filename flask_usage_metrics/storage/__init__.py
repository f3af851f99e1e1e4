"""Where records are written to, and read from: a storage a module, behind one contract.

`Writer` (`writer`) takes batches of records; `Storage` (`base`) can also be read. `registry` makes
the one that a URL names.
"""

from __future__ import annotations

from flask_usage_metrics.storage.base import Storage
from flask_usage_metrics.storage.registry import as_writer, open_storage
from flask_usage_metrics.storage.writer import Writer

__all__ = ["Storage", "Writer", "as_writer", "open_storage"]
