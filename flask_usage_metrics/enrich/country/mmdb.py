"""The country from a MaxMind DB file that may change, vanish or arrive while we run."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

import maxminddb

from flask_usage_metrics.enrich.country.answer import UNKNOWN, Answer, as_answer
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.runtime.caches import TwoGenerationCache
from flask_usage_metrics.runtime.faults import Faults, reason_of
from flask_usage_metrics.runtime.passing import is_passing

logger = logging.getLogger("flask_usage_metrics")

_CACHED = 8192
_MAX_CACHED_ADDRESS = 64

_SAMPLE = 1000
"""Records of a new file of which one must name a country; nearly always the first does."""

_Signature = tuple[int, int, int]


class CountryFile:
    """Looks addresses up in a private copy of a file, made again when the file changed.

    A file that is overwritten or cut in place under a memory map kills the process by SIGBUS; a
    copy that nobody else knows cannot be. It costs the file's size once a process, whatever the
    number of apps.

    Args:
        path: The file. One that is missing or broken is reported and tried again later.
        limits: How often to look for a change.
        faults: Where a file that cannot be used is reported.

    Raises:
        OSError: There are too few open files, say: it may be read the next time.
        MemoryError: Likewise.
    """

    is_static = False

    def __init__(self, path: Path, limits: Limits, faults: Faults) -> None:
        self._path = path.absolute()
        self._limits = limits
        self._faults = faults
        self._signature: _Signature | None = None
        self._answers: _Answers | None = None
        self._look_after(limits.clock(), is_first=True)

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer:
        """Answer from the file, private addresses too: it is the owner's and may know them."""
        now = self._limits.clock()
        if now >= self._look_at:
            self._look_after(now)
        if address is None or self._answers is None:
            return UNKNOWN
        return self._answers[address]

    def _look_after(self, now: float, *, is_first: bool = False) -> None:
        self._look_at = now + self._limits.stat_seconds
        try:
            if _signature(self._path.stat()) == self._signature:
                return
            answers, self._signature = _read(self._path)
        except (OSError, ValueError, MemoryError, maxminddb.InvalidDatabaseError) as error:
            if is_first and is_passing(error):
                raise
            kept = "countries are unknown"
            if self._answers is not None:
                kept = "the one read before is used"
            reason = reason_of(error)
            self._faults.report("country", f"the MMDB file cannot be read ({reason})", kept)
            return
        # The old reader is not closed: whoever has it may be in the middle of a lookup.
        self._answers = answers
        if answers.other_type:
            kind = f"the MMDB file is one of {answers.other_type!r}, which names no countries"
            self._faults.report("country", kind, "countries are unknown")


class _Answers(TwoGenerationCache[str, Answer]):
    """What a reader answers. MaxMind's own files name a country in eight languages: slow to read.

    Attributes:
        other_type: Type of a file that names no countries, such as one of networks; else ``""``.
    """

    def __init__(self, reader: maxminddb.Reader) -> None:
        super().__init__(partial(_look_up, reader), len, most=_CACHED, longest=_MAX_CACHED_ADDRESS)
        self.other_type = ""
        if not any(_country(record).country for _, record in islice(reader, _SAMPLE)):
            self.other_type = reader.metadata().database_type[:64] or "unknown type"


_ANSWERS: WeakValueDictionary[tuple[Path, _Signature], _Answers] = WeakValueDictionary()
"""Of each file that an app of this process uses: they share the copy."""


def _read(path: Path) -> tuple[_Answers, _Signature]:
    signature = _signature(path.stat())
    answers = _ANSWERS.get((path, signature))
    if answers is None:
        reader, signature = _open_copy(path)
        answers = _ANSWERS[path, signature] = _Answers(reader)
        if type(reader).__module__ != "maxminddb.extension":
            _warn_of_decoder()
    return answers, signature


@cache
def _warn_of_decoder() -> None:
    logger.warning("maxminddb has no C extension here: a country lookup takes about 80 µs, not 5")


def _look_up(reader: maxminddb.Reader, address: str) -> Answer:
    try:
        record = reader.get(address)
    except ValueError:  # an IPv6 address, and a file that has IPv4 only
        return UNKNOWN
    return _country(record)


def _signature(stat: os.stat_result) -> _Signature:
    return (stat.st_ino, stat.st_size, stat.st_mtime_ns)


def _open_copy(path: Path) -> tuple[maxminddb.Reader, _Signature]:
    with path.open("rb") as file:
        signature = _signature(os.fstat(file.fileno()))
        try:
            reader = _open_temporary(file)
        except OSError:
            # No folder for temporary files, as in a container with a read-only root, or no room.
            if not hasattr(os, "memfd_create"):
                raise
            reader = _open_in_memory(file)
        if _signature(os.fstat(file.fileno())) != signature:
            raise OSError("written while it was read")
    return reader, signature


def _open_temporary(file: IO[bytes]) -> maxminddb.Reader:
    descriptor, name = tempfile.mkstemp(prefix="flask_usage_metrics-", suffix=".mmdb")
    try:
        with os.fdopen(descriptor, "wb") as copy:
            shutil.copyfileobj(file, copy, 1 << 20)
        return maxminddb.open_database(name)
    finally:
        with suppress(PermissionError):  # Windows keeps a mapped file
            Path(name).unlink()


def _open_in_memory(file: IO[bytes]) -> maxminddb.Reader:
    file.seek(0)
    with os.fdopen(os.memfd_create("flask_usage_metrics"), "wb") as copy:
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        return maxminddb.open_database(f"/proc/self/fd/{copy.fileno()}")


def _country(record: object) -> Answer:
    """Read every layout: MaxMind's and DB-IP's, IPinfo Lite's, IPinfo's old one."""
    if not isinstance(record, dict):
        return UNKNOWN
    country = record.get("country")
    registered = record.get("registered_country")
    for code in (
        country.get("iso_code") if isinstance(country, dict) else None,
        record.get("country_code"),
        country,
        registered.get("iso_code") if isinstance(registered, dict) else None,
    ):
        answer = as_answer(code)
        if answer.country:
            return answer
    return UNKNOWN
