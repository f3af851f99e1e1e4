"""Merges the files of client_python's multiprocess mode, which hold the app's own metrics."""

from __future__ import annotations

import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from prometheus_client import values
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from flask_usage_metrics.runtime.faults import Faults, reason_of
from flask_usage_metrics.runtime.texts import encodable

_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"

_FILE = re.compile(r"(?:(counter|histogram|summary)|gauge_(live)?([a-z]+))_(.+)\.db", re.DOTALL)

_SUFFIXES = {
    "counter": ("_total",),
    "gauge": ("",),
    "histogram": ("_bucket", "_sum", "_count"),
    "summary": ("_count", "_sum"),
}

_PAGE_BYTES = 4096
_HEADER_BYTES = 8
_unpack_length = struct.Struct("i").unpack_from
_unpack_point = struct.Struct("dd").unpack_from


def multiprocess_files(faults: Faults) -> MultiprocessFiles | None:
    """Return the files of ``PROMETHEUS_MULTIPROC_DIR``; None when it is not set."""
    # The second is deprecated, but client_python still goes by it.
    folder = os.environ.get(_VARIABLE) or os.environ.get(_VARIABLE.lower())
    return MultiprocessFiles(folder, faults) if folder else None


class MultiprocessFiles(Collector):
    """Merges what client_python's multiprocess mode has written, as its own collector does.

    Differences to `prometheus_client.multiprocess.MultiProcessCollector`:

    - A file that is empty, cut short, damaged, unreadable or not client_python's is left out and
      reported once; there, one such file fails every scrape, and some make it run for ever.
    - Live gauges of processes that have ended are left out although nobody called
      `mark_process_dead`. What else such processes have counted is kept.
    - A character that cannot be encoded (a lone surrogate) is written as an escape.

    Files are never changed or removed, so each process that has ended costs every scrape the
    reading of its files. Empty the folder before the server starts, as client_python says.

    Args:
        folder: Value of ``PROMETHEUS_MULTIPROC_DIR``.
        faults: Where files that are left out are reported, as part ``"multiprocess"``.
    """

    def __init__(self, folder: str, faults: Faults) -> None:
        self._folder = Path(folder)
        self._faults = faults
        self._left_out: dict[str, str] = {}
        # client_python chooses for good when it is first imported.
        if not getattr(values.ValueClass, "_multiprocess", True):
            self.report(
                f"{_VARIABLE} was set after prometheus_client had been imported",
                "this worker's own metrics are not shared",
            )

    def collect(self) -> Iterator[Metric]:
        """Yield the families of all files; never fails."""
        merge = _Merge()
        left_out, self._left_out = self._left_out, {}
        for name in self._names():
            match = _FILE.fullmatch(name)
            if match is None:
                self._leave_out(name, "a file of no known type", left_out)
                continue
            kind, live, mode, process = match.groups()
            if live and not _may_be_alive(process):
                continue
            try:
                merge.add(kind or "gauge", mode or "sum", process, _read(self._folder / name))
            except _Damaged as damage:
                self._leave_out(name, str(damage), left_out)
            except Exception as error:  # noqa: BLE001 - whatever a file holds, a scrape goes on
                # mark_process_dead removes live gauges at any time.
                if not (live and isinstance(error, FileNotFoundError)):
                    self._leave_out(name, error, left_out)
        yield from merge.metrics()

    def _leave_out(self, name: str, error: Exception | str, before: Mapping[str, str]) -> None:
        """Report that a file is left out, unless it was for this reason at the last scrape."""
        reason = error if isinstance(error, str) else reason_of(error)
        self._left_out[name] = reason
        if before.get(name) != reason:
            self.report(error, f"{name!a} is left out")

    def report(self, error: BaseException | str, consequence: str) -> None:
        """Report that something cannot be merged; see `Faults.report`."""
        self._faults.report("multiprocess", error, consequence)

    def _names(self) -> list[str]:
        try:
            # Sorted: floats added in another order may come out an ulp lower, which Prometheus
            # takes for a reset.
            return sorted(
                path.name
                for path in self._folder.iterdir()
                if path.suffix == ".db" and not path.name.startswith(".")
            )
        except OSError as error:
            self.report(error, f"no metrics are merged from {_VARIABLE}")
            return []


class _Damaged(Exception):
    """A file is not what client_python writes; the text says what it is instead."""


_Point = tuple[float, float]
"""A value, and when a gauge was set to it in Unix seconds (0: not said).

As struct returns it: see "Figures behind the code" in tests/benchmarks/README.md.
"""


class _Series(NamedTuple):
    family: str
    help: str
    sample: str
    labels: tuple[tuple[str, str], ...]
    """Names and values, sorted; without ``le``."""
    bound: float | None
    """Upper bound of a bucket; None: not a bucket."""


def _sum(a: _Point, b: _Point) -> _Point:
    return a[0] + b[0], 0.0


def _min(a: _Point, b: _Point) -> _Point:
    return b if b[0] < a[0] else a


def _max(a: _Point, b: _Point) -> _Point:
    return b if b[0] > a[0] else a


def _most_recent(a: _Point, b: _Point) -> _Point:
    return b if b[1] > a[1] else a


def _last(_: _Point, b: _Point) -> _Point:
    return b


_COMBINE: dict[str, Callable[[_Point, _Point], _Point]] = {
    "sum": _sum,
    "min": _min,
    "max": _max,
    "mostrecent": _most_recent,
    "all": _last,  # a process is met twice only when another had its id before
}


class _Merge:
    """Adds files up, one whole file at a time."""

    def __init__(self) -> None:
        self._series: dict[str, dict[bytes, _Series]] = {}
        self._points: dict[tuple[str, str, str], dict[bytes, _Point]] = {}

    def add(self, kind: str, mode: str, process: str, entries: list[tuple[bytes, _Point]]) -> None:
        """Add the entries of a file.

        Args:
            kind: Of its metrics.
            mode: How gauges of several processes become one (without ``live``); else ``"sum"``.
            process: Its id, for gauges that stay one a process.
            entries: Its keys and values.

        Raises:
            _Damaged: One of the keys is not client_python's; nothing was added.
        """
        # A mode that is unknown is younger than this code; client_python takes them so, too.
        mode = mode if mode in _COMBINE else "all"
        series = self._series.setdefault(kind, {})
        for key, _ in entries:
            if key not in series:
                series[key] = _parse_key(kind, key)
        # Combined by the bytes of the key: to parse keys is most of the cost.
        points = self._points.setdefault((kind, mode, process if mode == "all" else ""), {})
        combine = _COMBINE[mode]
        for key, point in entries:
            known = points.get(key)
            points[key] = point if known is None else combine(known, point)

    def metrics(self) -> Iterator[Metric]:
        """Yield the families of all that was added."""
        metrics: dict[str, Metric] = {}
        groups: dict[str, _Groups] = {}
        for (kind, mode, process), points in self._points.items():
            of_process = (("pid", process),) if process else ()
            for key, point in points.items():
                series = self._series[kind][key]
                metric = metrics.get(series.family)
                if metric is None:
                    metric = metrics[series.family] = Metric(series.family, series.help, kind)
                if metric.type != kind or (mode == "mostrecent" and not point[1]):
                    # A version of the app before this one had another type under the name, and
                    # there is room for one; or the gauge was never set.
                    continue
                by_labels = groups.setdefault(series.family, {})
                group = by_labels.setdefault(series.labels + of_process, {})
                # The same series has two keys when its help text was changed.
                known = group.get((series.sample, series.bound))
                group[series.sample, series.bound] = (
                    point if known is None else _COMBINE[mode](known, point)
                )
        for name, metric in metrics.items():
            for labels, group in groups.get(name, {}).items():
                _add_samples(metric, dict(labels), group)
            yield metric


_Group = dict[tuple[str, float | None], _Point]
"""By name of the sample and bound of the bucket."""

_Groups = dict[tuple[tuple[str, str], ...], _Group]
"""By labels: OpenMetrics wants the samples of one label set side by side."""


def _add_samples(metric: Metric, labels: dict[str, str], group: _Group) -> None:
    buckets = []
    for (sample, bound), point in group.items():
        if bound is None:
            metric.add_sample(sample, labels, point[0])
        else:
            buckets.append((bound, point[0]))
    if buckets:
        total = 0.0
        for bound, count in sorted(buckets):
            total += count
            le = str(floatToGoString(bound))  # type: ignore[no-untyped-call]
            metric.add_sample(f"{metric.name}_bucket", {**labels, "le": le}, total)
        metric.add_sample(f"{metric.name}_count", labels, total)


def _parse_key(kind: str, key: bytes) -> _Series:
    """Parse a key: JSON of family, sample, labels and help text.

    Raises:
        _Damaged: It is not a key of client_python's.
    """
    try:
        family, sample, labels, help_text = json.loads(key)
        if not all(isinstance(text, str) for text in (family, sample, help_text, *labels.values())):
            raise TypeError("not text")
        Metric(family, help_text, kind)  # refuses what is not a name
        bound = None
        if kind == "histogram" and "le" in labels:
            bound = float(labels.pop("le"))
        if not sample.startswith(family) or sample[len(family) :] not in _SUFFIXES[kind]:
            raise ValueError("a sample of another family")
        if (bound is not None) != sample.endswith("_bucket") or bound != bound:
            raise ValueError("a bucket without a bound")
    except Exception as error:
        raise _Damaged("a damaged file") from error
    cleaned = sorted((encodable(name), encodable(value)) for name, value in labels.items())
    return _Series(family, encodable(help_text), sample, tuple(cleaned), bound)


def _read(path: Path) -> list[tuple[bytes, _Point]]:
    """Return the keys and values of a file.

    It is being written to meanwhile, by a process that first appends an entry and then says how
    much is used. The format is that of `prometheus_client.mmap_dict.MmapedDict`.

    Raises:
        OSError: It cannot be read.
        _Damaged: It is not of that format.
    """
    if not path.is_file() and path.exists():
        raise _Damaged("not a file")  # opening a named pipe would wait for a writer
    with path.open("rb") as file:
        data = file.read(_PAGE_BYTES)
        if not data:
            raise _Damaged("an empty file")
        if len(data) < _HEADER_BYTES:
            raise _Damaged("a truncated file")
        (used,) = _unpack_length(data)
        # Compared first: read() takes as much memory as it is asked to.
        if used > os.fstat(file.fileno()).st_size:
            raise _Damaged("a truncated file")
        if used > len(data):
            data += file.read(used - len(data))
    if used < 0 or used > len(data):
        raise _Damaged("a damaged file")
    entries = []
    position = _HEADER_BYTES
    while position < used:  # 0 is used of a file that was made just now
        start = position + 4
        if start > used:
            raise _Damaged("a damaged file")
        (length,) = _unpack_length(data, position)
        end = start + length
        padded = end + 8 - (length + 4) % 8
        position = padded + 16
        if length <= 0 or position > used:
            raise _Damaged("a damaged file")
        entries.append((data[start:end], _unpack_point(data, padded)))
    return entries


def _may_be_alive(process: str) -> bool:
    # Signal 0 only asks, but on Windows it is Ctrl+C.
    if os.name != "posix" or not (process.isascii() and process.isdigit()):
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user; not a process id
        pass
    return True
