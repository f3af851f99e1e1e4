"""Metric families at one moment: all that an encoder of any format needs to know."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import accumulate
from operator import itemgetter
from typing import Any

import msgspec

from flask_usage_metrics.metrics.exemplars import BucketExemplars
from flask_usage_metrics.metrics.names import Description

LabelValues = tuple[str, ...]
"""Label values of a series, in the order of the family's labels."""

Numbers = list[int | float]
"""The numbers of one series; of a histogram: the count in each bucket alone, then the sum in
seconds."""

BLOCK = 32
"""So many series of a family are encoded together, and again when one of them changed.

See "Figures behind the code" in tests/benchmarks/README.md.
"""

BlockCache = dict[tuple[str, str], Any]
"""Encoded blocks of series, by name of the family and format; values are the encoder's own.

Families that share a table share its caches. When a series changes, its block gets another, empty
dictionary: scrapes that are under way may still fill the old one.
"""


class LabelSet:
    """The label values of one series, and their text in an exposition.

    Attributes:
        values: Clean values, in the order of the family's labels.
        text: ``name="value",...``, escaped, in UTF-8.
    """

    __slots__ = ("text", "values")

    def __init__(self, names: Iterable[str], values: LabelValues) -> None:
        self.values = values
        pairs = zip(names, values, strict=True)
        self.text = ",".join(f'{name}="{_escape(value)}"' for name, value in pairs).encode()


class Family(msgspec.Struct, frozen=True):
    """A family at one moment.

    Attributes:
        description: Its metadata.
        labels: Names of the labels, renamed.
        series: Labels of each series.
        numbers: The numbers of each series.
        caches: For each `BLOCK` of series its cache; empty: nothing is to be cached.
        exemplars: By the label values of those series of a histogram that have any.
        value: Takes the value of a counter or gauge from the numbers of a series.
        buckets: Upper bounds in seconds of a histogram, ascending, without ``+Inf``.
        leaves_out: Tells by its label values which series of a histogram is not one of it, in a
            table that it shares with a counter; None: each is.
    """

    description: Description
    labels: tuple[str, ...]
    series: list[LabelSet] = []
    numbers: list[Numbers] = []
    caches: list[BlockCache] = []
    exemplars: dict[LabelValues, BucketExemplars] = {}
    value: Callable[[Numbers], float] = itemgetter(0)
    buckets: tuple[float, ...] = ()
    leaves_out: Callable[[LabelValues], bool] | None = None

    @property
    def samples(self) -> list[tuple[LabelSet, float]]:
        """The value of each series of a counter or gauge."""
        values = map(self.value, self.numbers)
        return [*zip(self.series, values, strict=True)]

    @property
    def histograms(self) -> list[tuple[LabelSet, list[int], float]]:
        """For each series the cumulative counts by bucket, and the sum in seconds."""
        return [
            (labels, [*accumulate(map(int, numbers[:-1]))], float(numbers[-1]))
            for labels, numbers in zip(self.series, self.numbers, strict=True)
            if self.leaves_out is None or not self.leaves_out(labels.values)
        ]


def _escape(value: str) -> str:
    """Escape a label's value; text format and OpenMetrics agree on how."""
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")
