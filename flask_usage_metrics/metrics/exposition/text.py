"""Our families as text or gzip, in blocks of series; a block that did not change is used again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from functools import partial
from itertools import accumulate

from flask_usage_metrics.metrics.exemplars import unpack
from flask_usage_metrics.metrics.exposition.collector import number
from flask_usage_metrics.metrics.exposition.gzip_stream import GzipStream
from flask_usage_metrics.metrics.names import BLOCK, Family, Kept, LabelSet
from flask_usage_metrics.metrics.shared_totals import Numbers

_Write = Callable[[LabelSet, Numbers], bytes]

_LABELS = b"\0"
"""Stands for the labels in lines that are made but for them; NUL is in no label, they are clean."""


class Block:
    """Some lines of an exposition.

    Attributes:
        text: Makes them.
        kept: Where they are kept once they are compressed; None: nowhere.
        key: What they are kept under.
    """

    __slots__ = ("kept", "key", "text")

    def __init__(
        self,
        text: Callable[[], bytes],
        kept: Kept | None = None,
        key: tuple[str, bool] = ("", False),
    ) -> None:
        self.text = text
        self.kept = kept
        self.key = key


def encode(blocks: Iterable[Block]) -> bytes:
    """Return all lines."""
    return b"".join([block.text() for block in blocks])


def compress(blocks: Iterable[Block]) -> bytes:
    """Return all lines in gzip; what is kept is not made anew.

    Several threads may do so at once, then each finds what the others have made.
    """
    stream = GzipStream()
    for block in blocks:
        piece = None if block.kept is None else block.kept.get(block.key)
        if piece is not None:
            stream.add(piece)
            continue
        piece = stream.write(block.text())
        if block.kept is not None:
            block.kept[block.key] = piece
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
    for family in families:
        described = family.description
        name = described.name
        is_histogram = described.kind == "histogram"
        told = {f"{name}_{kind}" for kind in ("bucket", "count", "sum")} if is_histogram else {name}
        if names and (told.isdisjoint(names) or not family.series):
            continue
        if openmetrics and described.kind == "counter":
            name = name.removesuffix("_total")
        head = f"# HELP {name} {described.help}\n# TYPE {name} {described.kind}\n".encode()
        write = _histogram_writer(family, openmetrics) if is_histogram else _sample_writer(family)
        if names and not told <= {*names}:
            write = partial(_only, {name.encode() for name in names}, write)
        for start in range(0, len(family.series) or 1, BLOCK):
            labels = family.series[start : start + BLOCK]
            text = partial(_text, head, write, labels, family.rows[start : start + BLOCK])
            # The last block is short: a small site has nothing but short ones, and keeps nothing.
            if family.kept and len(labels) == BLOCK and not names:
                yield Block(text, family.kept[start // BLOCK], (described.name, openmetrics))
            else:
                yield Block(text)
            head = b""


def _text(head: bytes, write: _Write, labels: list[LabelSet], rows: list[Numbers]) -> bytes:
    return head + b"".join(map(write, labels, rows))


def _only(names: Collection[bytes], write: _Write, labels: LabelSet, row: Numbers) -> bytes:
    lines = write(labels, row).splitlines(keepends=True)
    return b"".join([line for line in lines if line.split(b"{")[0].split(b" ")[0] in names])


def _sample_writer(family: Family) -> _Write:
    """Return what writes the line of a counter's or gauge's series."""
    name, braces = family.description.name, "{\0}" if family.labels else ""
    if family.description.kind == "counter":  # a whole number
        line = f"{name}{braces} %d.0\n".encode()
        return lambda labels, row: (line % family.value(row)).replace(_LABELS, labels.text)
    line = f"{name}{braces} %b\n".encode()

    def write(labels: LabelSet, row: Numbers) -> bytes:
        return (line % number(family.value(row)).encode()).replace(_LABELS, labels.text)

    return write


def _histogram_writer(family: Family, openmetrics: bool) -> _Write:
    """Return what writes the lines of a histogram's series."""
    name = family.description.name
    start, braces = ("{\0,", "{\0}") if family.labels else ("{", "")
    bounds = [*map(number, family.buckets), "+Inf"]
    buckets = "".join([f'{name}_bucket{start}le="{bound}"}} %d.0\n' for bound in bounds]).encode()
    others = f"{name}_count{braces} %d.0\n{name}_sum{braces} %b\n".encode()
    # To write all lines at once takes half as long as one after the other, and in bytes half as
    # long as in str, whose `replace` is slow.
    lines = buckets + others
    lines_with_exemplars = buckets.replace(b"%d.0", b"%b") + others
    exemplars = family.exemplars if openmetrics else {}

    def write(labels: LabelSet, row: Numbers) -> bytes:
        counts = [*accumulate(row[:-1])]
        seconds = number(row[-1]).encode()
        observed = exemplars.get(labels.values)
        if observed is None:
            text = lines % (*counts, counts[-1], seconds)
        else:
            told = map(_with_exemplar, counts, observed)
            text = lines_with_exemplars % (*told, counts[-1], seconds)
        return text.replace(_LABELS, labels.text)

    return write


def _with_exemplar(count: float, packed: bytes) -> bytes:
    if not packed:
        return b"%d.0" % count
    found = unpack(packed)
    ids = f'{{trace_id="{found.trace_id}",span_id="{found.span_id}"}}'  # digits need no escape
    return f"{count:.1f} # {ids} {found.value} {found.timestamp:.3f}".encode()
