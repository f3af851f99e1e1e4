"""Our families as text or gzip, in blocks of series; unchanged blocks are not compressed again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import accumulate

from flask_usage_metrics.metrics.exemplars import unpack
from flask_usage_metrics.metrics.exposition.collector import number
from flask_usage_metrics.metrics.exposition.gzip_stream import GzipStream
from flask_usage_metrics.metrics.families import BLOCK, BlockCache, Family, LabelSet, Numbers

_Write = Callable[[LabelSet, Numbers], bytes]

_LABELS = b"\0"
"""Stands for the labels in a template of lines; labels are clean, none of them holds a NUL."""


class Block:
    """Some lines of an exposition.

    Attributes:
        text: Returns them, encoded.
        cache: Where they are kept compressed; None: nowhere.
        key: Their key in the cache.
    """

    __slots__ = ("cache", "key", "text")

    def __init__(
        self,
        text: Callable[[], bytes],
        cache: BlockCache | None = None,
        key: tuple[str, str] = ("", ""),
    ) -> None:
        self.text = text
        self.cache = cache
        self.key = key


def encode(blocks: Iterable[Block]) -> bytes:
    """Return all lines."""
    return b"".join([block.text() for block in blocks])


def compress(blocks: Iterable[Block]) -> bytes:
    """Return all lines in gzip; cached blocks are not made anew.

    Several threads may do so at once: each finds what the others have cached.
    """
    stream = GzipStream()
    for block in blocks:
        compressed = None if block.cache is None else block.cache.get(block.key)
        if compressed is not None:
            stream.add(compressed)
            continue
        compressed = stream.write(block.text())
        if block.cache is not None:
            block.cache[block.key] = compressed
    return stream.finish()


def blocks_of(
    families: Iterable[Family], openmetrics: bool, names: Collection[str] = frozenset()
) -> Iterator[Block]:
    """Yield families, without an end mark.

    Args:
        families: As `Totals.families` returns them.
        openmetrics: In the OpenMetrics format (1.0), which alone has room for exemplars, instead of
            Prometheus' text format (0.0.4).
        names: Only the samples of these names; empty: all.
    """
    written = "OpenMetrics in gzip" if openmetrics else "text in gzip"
    for family in families:
        description = family.description
        name = description.name
        is_histogram = description.kind == "histogram"
        samples = {name}
        if is_histogram:
            samples = {f"{name}_{kind}" for kind in ("bucket", "count", "sum")}
        if names and (samples.isdisjoint(names) or not family.series):
            continue
        if openmetrics and description.kind == "counter":
            name = name.removesuffix("_total")
        head = f"# HELP {name} {description.help}\n# TYPE {name} {description.kind}\n".encode()
        write = _histogram_writer(family, openmetrics) if is_histogram else _sample_writer(family)
        if names and not samples <= {*names}:
            write = partial(_only, {name.encode() for name in names}, write)
        for start in range(0, len(family.series) or 1, BLOCK):
            labels = family.series[start : start + BLOCK]
            text = partial(_text, head, write, labels, family.numbers[start : start + BLOCK])
            # The last block is short: a small site has nothing but short ones, and caches nothing.
            if family.caches and len(labels) == BLOCK and not names:
                cache = family.caches[start // BLOCK]
                yield Block(text, cache, (description.name, written))
            else:
                yield Block(text)
            head = b""


def _text(head: bytes, write: _Write, labels: list[LabelSet], numbers: list[Numbers]) -> bytes:
    return head + b"".join(map(write, labels, numbers))


def _only(names: Collection[bytes], write: _Write, labels: LabelSet, numbers: Numbers) -> bytes:
    lines = write(labels, numbers).splitlines(keepends=True)
    return b"".join([line for line in lines if line.split(b"{")[0].split(b" ")[0] in names])


def _sample_writer(family: Family) -> _Write:
    """Return a function that writes the line of a counter's or gauge's series."""
    name, braces = family.description.name, "{\0}" if family.labels else ""
    if family.description.kind == "counter":  # a whole number
        line = f"{name}{braces} %d.0\n".encode()
        return lambda labels, numbers: (line % family.value(numbers)).replace(_LABELS, labels.text)
    line = f"{name}{braces} %b\n".encode()

    def write(labels: LabelSet, numbers: Numbers) -> bytes:
        return (line % number(family.value(numbers)).encode()).replace(_LABELS, labels.text)

    return write


def _histogram_writer(family: Family, openmetrics: bool) -> _Write:
    """Return a function that writes the lines of a histogram's series."""
    name = family.description.name
    start, braces = ("{\0,", "{\0}") if family.labels else ("{", "")
    bounds = [*map(number, family.buckets), "+Inf"]
    buckets = "".join([f'{name}_bucket{start}le="{bound}"}} %d.0\n' for bound in bounds]).encode()
    others = f"{name}_count{braces} %d.0\n{name}_sum{braces} %b\n".encode()
    # All lines at once, and in bytes: see "Figures behind the code" in tests/benchmarks/README.md.
    lines = buckets + others
    lines_with_exemplars = buckets.replace(b"%d.0", b"%b") + others
    exemplars = family.exemplars if openmetrics else {}
    leaves_out = family.leaves_out

    def write(labels: LabelSet, numbers: Numbers) -> bytes:
        if leaves_out is not None and leaves_out(labels.values):
            return b""
        counts = [*accumulate(numbers[:-1])]
        seconds = number(numbers[-1]).encode()
        observed = exemplars.get(labels.values)
        if observed is None:
            text = lines % (*counts, counts[-1], seconds)
        else:
            samples = map(_with_exemplar, counts, observed)
            text = lines_with_exemplars % (*samples, counts[-1], seconds)
        return text.replace(_LABELS, labels.text)

    return write


def _with_exemplar(count: float, packed: bytes) -> bytes:
    if not packed:
        return b"%d.0" % count
    found = unpack(packed)
    ids = f'{{trace_id="{found.trace_id}",span_id="{found.span_id}"}}'  # digits need no escape
    return f"{count:.1f} # {ids} {found.value} {found.timestamp:.3f}".encode()
