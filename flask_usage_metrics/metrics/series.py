"""The series of one family: their labels, what is new here, and what the siblings have."""

from __future__ import annotations

from operator import add
from typing import Any

from flask_usage_metrics.metrics.exemplars import Row, newest
from flask_usage_metrics.metrics.names import BLOCK, Description, Family, Kept, LabelSet
from flask_usage_metrics.metrics.shared_totals import Numbers

Values = tuple[str, ...]
"""Label values, in the order of the family's labels."""


class Series:
    """One series; it lives as long as its table.

    Attributes:
        values: Label values.
        place: Which one of its table it is, in the order of their first sight.
        sums: What is counted of it, but for what is new. Not changed but replaced: scrapes go on
            reading what they were given. None: nothing.
        new: What was counted here and is not in the sums yet. None: nothing.
        exemplars: The exemplar of each bucket, of what is new. None: there is none.
    """

    __slots__ = ("_table", "exemplars", "new", "place", "sums", "values")

    def __init__(self, table: Table, values: Values, place: int) -> None:
        self._table = table
        self.values = values
        self.place = place
        self.sums: Numbers | None = None
        self.new: Numbers | None = None
        self.exemplars: Row | None = None

    def start(self) -> Numbers:
        """Return the new numbers, of which there are none yet, to be added to."""
        self.new = [0] * self._table.width
        self._table.dirty.append(self)
        return self.new

    def keep(self, exemplar: bytes, bucket: int) -> None:
        """Keep a packed exemplar of what is new, unless the one that is kept is newer."""
        if exemplar and self.exemplars is None:
            self.exemplars = [b""] * (self._table.width - 1)
        if self.exemplars is not None:
            self.exemplars[bucket] = max(self.exemplars[bucket], exemplar)


class Table:
    """The series of one family.

    Args:
        names: Names of the labels.
        bound: How many series there may be before they are folded.
        width: How many numbers a series has.

    Attributes:
        series: Every series that is known, here or from siblings, by its label values.
        dirty: Those with something new.
    """

    def __init__(self, names: tuple[str, ...], bound: int, width: int) -> None:
        self.bound = bound
        self.width = width
        self.series: dict[Values, Series] = {}
        self.dirty: list[Series] = []
        self._names = names
        self._nothing: Numbers = [0] * width
        # What scrapes are shown, by place.
        self._labels: list[LabelSet] = []
        self._rows: list[Numbers] = []
        self._kept: list[Kept] = []
        self._exemplars: dict[Values, Row] = {}

    # ------------------------------------------------------------------------ writing

    def find(self, values: Values) -> Series:
        """Return a series; what was not known is from now on."""
        series = self.series.get(values)
        if series is None:
            series = self.series[values] = Series(self, values, len(self._rows))
            self._labels.append(LabelSet(self._names, values))
            self._rows.append(self._nothing)
            if series.place % BLOCK == 0:
                self._kept.append({})
        return series

    def fit(self, values: Values, folded: Values) -> Series:
        """Return a series, or the folded one if it is not known and there is no room for it."""
        is_known = values in self.series or not self.is_full()
        return self.find(values if is_known else folded)

    def is_full(self, spare: int = 0) -> bool:
        """Tell whether there are as many series as there may be."""
        return len(self.series) >= self.bound + spare

    def row(self, values: Values) -> Numbers:
        """Return the new numbers of a series, to be added to."""
        series = self.find(values)
        return series.new or series.start()

    # ------------------------------------------------------------------------ sharing

    def merge_local(self) -> None:
        """Add what is new to the sums; for a process that is alone."""
        for series in self.dirty:
            self._show(series)
            series.sums = self._rows[series.place]
        self.clear_new()

    def resend(self) -> None:
        """Take the sums for new: there are siblings now, who know nothing of them."""
        self.merge_local()
        for series in self.series.values():
            if series.sums is not None:
                self.dirty.append(series)
                series.new, series.sums = [*series.sums], None
                exemplars = self._exemplars.get(series.values)
                series.exemplars = None if exemplars is None else [*exemplars]

    def clear_new(self) -> None:
        """Take note that what was new is in the sums."""
        for series in self.dirty:
            series.new = series.exemplars = None
        self.dirty.clear()

    def apply(self, values: Values, sums: Numbers, exemplars: Row | None) -> None:
        """Take over the sums of a series, and the exemplars if there is any."""
        series = self.find(values)
        series.sums = sums
        if exemplars is not None:
            self._exemplars[values] = exemplars
        self._show(series)

    # ------------------------------------------------------------------------ reading

    def show_new(self) -> None:
        """Show what is new, too."""
        for series in self.dirty:
            self._show(series)

    def family(self, description: Description, **options: Any) -> Family:
        """Return a family of what is shown now.

        Args:
            description: Of the family.
            **options: Further attributes of the family.
        """
        return Family(
            description,
            self._names,
            self._labels.copy(),
            self._rows.copy(),
            self._kept.copy(),
            self._exemplars.copy() if description.kind == "histogram" else {},
            **options,
        )

    def _show(self, series: Series) -> None:
        sums, new = series.sums, series.new
        if sums is None or new is None:
            shown = sums or [*(new or self._nothing)]
        else:
            shown = [*map(add, sums, new)]
        self._rows[series.place] = shown
        if series.exemplars is not None:
            known = self._exemplars.get(series.values)
            self._exemplars[series.values] = newest(known, series.exemplars)
        self._kept[series.place // BLOCK] = {}
