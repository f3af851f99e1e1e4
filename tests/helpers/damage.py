"""Ways in which a file that processes share is lost or damaged."""

from __future__ import annotations

import shutil
from pathlib import Path


def break_it(path: Path, how: str) -> None:
    """Damage a file of a shared database in one of these ways."""
    if how == "removed":
        path.unlink()
    elif how == "folder-removed":
        shutil.rmtree(path.parent)
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "garbage":
        path.write_bytes(b"garbage" * 5000)
    elif how == "half":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    elif how == "replaced":
        other = path.with_name("other")
        other.write_bytes(b"")
        other.replace(path)
