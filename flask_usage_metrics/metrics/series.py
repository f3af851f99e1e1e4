"""The series of one family: labels, numbers not shared yet, and the sums of all workers."""

from __future__ import annotations

from operator import add
from typing import Any

from flask_usage_metrics.metrics.exemplars import BucketExemplars, newest
from flask_usage_metrics.metrics.families import (
    BLOCK,
    BlockCache,
    Family,
    LabelSet,
    LabelValues,
    Numbers,
)
from flask_usage_metrics.metrics.names import Description


class Series:
    """One series; it lives as long as its table.

    Attributes:
        values: Label values.
        index: Its number in the table, in the order of first sight.
        sums: Its numbers over all workers, without `new`; None: nothing was counted. The list is
            replaced, never changed: a scrape may still read it.
        new: Its numbers counted here that are not in `sums` yet; None: there are none.
        exemplars: Packed exemplars of `new`, one a bucket, ``b""`` if it has none; None: none.
    """

    __slots__ = ("_table", "exemplars", "index", "new", "sums", "values")

    def __init__(self, table: Table, values: LabelValues, index: int) -> None:
        self._table = table
        self.values = values
        self.index = index
        self.sums: Numbers | None = None
        self.new: Numbers | None = None
        self.exemplars: BucketExemplars | None = None

    def start(self) -> Numbers:
        """Make `new`, which must be None, a list of zeros; return it to be added to."""
        self.new = [0] * self._table.width
        self._table.dirty.append(self)
        return self.new

    def keep(self, exemplar: bytes, bucket: int) -> None:
        """Keep a packed exemplar of a bucket, unless the one kept is newer."""
        if exemplar and self.exemplars is None:
            self.exemplars = [b""] * (self._table.width - 1)
        if self.exemplars is not None:
            self.exemplars[bucket] = max(self.exemplars[bucket], exemplar)


class Table:
    """The series of one family.

    Args:
        names: See the attribute.
        bound: Number of series from which on labels are folded into ``__other__``.
        width: How many numbers a series has.

    Attributes:
        names: Names of the labels.
        series: Every series that is known, here or from other workers, by its label values.
        dirty: The series whose `new` is not None.
    """

    def __init__(self, names: tuple[str, ...], bound: int, width: int) -> None:
        self.bound = bound
        self.width = width
        self.series: dict[LabelValues, Series] = {}
        self.dirty: list[Series] = []
        self.names = names
        self._zero: Numbers = [0] * width
        # What scrapes read, by the index of the series.
        self._labels: list[LabelSet] = []
        self._shown: list[Numbers] = []
        self._caches: list[BlockCache] = []
        self._exemplars: dict[LabelValues, BucketExemplars] = {}

    # ------------------------------------------------------------------------ counting

    def find(self, values: LabelValues) -> Series:
        """Return the series of label values; it is made if it is not known."""
        series = self.series.get(values)
        if series is None:
            series = self.series[values] = Series(self, values, len(self._shown))
            self._labels.append(LabelSet(self.names, values))
            self._shown.append(self._zero)
            if series.index % BLOCK == 0:
                self._caches.append({})
        return series

    def fit(self, values: LabelValues, folded: LabelValues) -> Series:
        """Return a series, or the folded one if it is not known and there is no room for it."""
        is_known = values in self.series or not self.is_full()
        return self.find(values if is_known else folded)

    def is_full(self, spare: int = 0) -> bool:
        """Tell whether there are `bound` series, and `spare` more."""
        return len(self.series) >= self.bound + spare

    def new_numbers(self, values: LabelValues) -> Numbers:
        """Return the new numbers of a series, to be added to."""
        series = self.find(values)
        return series.new or series.start()

    # ------------------------------------------------------------------------ sharing

    def merge_local(self) -> None:
        """Add the new numbers to the sums; for a process that shares them with no other."""
        for series in self.dirty:
            if series.new is not None:
                series.sums = _added(series.sums, series.new)
            if series.exemplars is not None:
                known = self._exemplars.get(series.values)
                self._exemplars[series.values] = newest(known, series.exemplars)
            self._show(series, series.sums or self._zero)
        self.clear_new()

    def resend(self) -> None:
        """Make the sums new again, to be sent to a shared file that does not have them yet."""
        self.merge_local()
        for series in self.series.values():
            if series.sums is not None:
                self.dirty.append(series)
                series.new, series.sums = [*series.sums], None
                exemplars = self._exemplars.get(series.values)
                series.exemplars = None if exemplars is None else [*exemplars]

    def clear_new(self) -> None:
        """Forget the new numbers, which are in the sums by now."""
        for series in self.dirty:
            series.new = series.exemplars = None
        self.dirty.clear()

    def apply(self, values: LabelValues, sums: Numbers, exemplars: BucketExemplars | None) -> None:
        """Set the sums of a series over all workers, and its exemplars unless None."""
        series = self.find(values)
        series.sums = sums
        if exemplars is not None:
            self._exemplars[values] = exemplars
        self._show(series, sums)

    # ------------------------------------------------------------------------ reading

    def show_new(self) -> None:
        """Show scrapes the sums with the new numbers added, which are in no shared file yet."""
        for series in self.dirty:
            if series.new is not None:
                self._show(series, _added(series.sums, series.new))

    def family(self, description: Description, **options: Any) -> Family:
        """Return the family as it is shown now.

        Args:
            description: Of the family.
            **options: Further attributes of the family.
        """
        return Family(
            description,
            self.names,
            self._labels.copy(),
            self._shown.copy(),
            self._caches.copy(),
            self._exemplars.copy() if description.kind == "histogram" else {},
            **options,
        )

    def _show(self, series: Series, numbers: Numbers) -> None:
        self._shown[series.index] = numbers
        self._caches[series.index // BLOCK] = {}


def _added(sums: Numbers | None, new: Numbers) -> Numbers:
    """Return the sum as a new list: a scrape may still read the old ones."""
    return [*new] if sums is None else [*map(add, sums, new)]
