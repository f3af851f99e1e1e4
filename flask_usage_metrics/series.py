"""The series of one family: their labels, what is new here, and what the siblings have."""

from __future__ import annotations

from collections.abc import Mapping
from operator import add

from flask_usage_metrics.exemplars import Row, newest
from flask_usage_metrics.metrics import LabelSet
from flask_usage_metrics.totals_file import Key, Numbers

Values = tuple[str, ...]
"""Label values, in the order of the family's labels."""


class Table:
    """The series of one family.

    Args:
        names: Names of the labels.
        bound: How many series there may be before they are folded.
        width: How many numbers a series has.

    Attributes:
        new: By label values, what was counted here and is not in the siblings' file yet.
        exemplars: By label values, those that are not in the siblings' file yet; of a histogram.
        labels: Every series that is known, here or from siblings.
    """

    def __init__(self, names: tuple[str, ...], bound: int, width: int) -> None:
        self.bound = bound
        self.new: dict[Values, Numbers] = {}
        self.exemplars: dict[Values, Row] = {}
        self.labels: dict[Values, LabelSet] = {}
        self._names = names
        self._width = width

    def row(self, values: Values) -> Numbers:
        """Return the new numbers of a series, to be added to."""
        row = self.new.get(values)
        if row is None:
            row = self.new[values] = [0] * self._width
            if values not in self.labels:
                self.learn(values)
        return row

    def keep(self, exemplar: bytes, values: Values, bucket: int) -> None:
        """Keep a packed exemplar of a bucket, unless the one that is kept is newer."""
        row = self.exemplars.get(values)
        if row is None:
            row = self.exemplars[values] = [b""] * (self._width - 1)
        row[bucket] = max(row[bucket], exemplar)

    def learn(self, values: Values) -> None:
        """Take note of a series."""
        self.labels[values] = LabelSet(self._names, values)

    def is_full(self, spare: int = 0) -> bool:
        """Tell whether there are as many series as there may be."""
        return len(self.labels) >= self.bound + spare

    def fit(self, values: Values, folded: Values) -> Values:
        """Return the values, or the folded ones if there is no room for a new series."""
        return values if values in self.labels or not self.is_full() else folded

    def rows(self, name: str, merged: Mapping[Key, Numbers]) -> list[tuple[LabelSet, Numbers]]:
        """Return all series with their numbers: the siblings' sums and what is new."""
        rows = []
        for values, labels in self.labels.items():
            old, new = merged.get((name, values)), self.new.get(values)
            if old is None:
                rows.append((labels, list(new or [0] * self._width)))
            else:
                rows.append((labels, old if new is None else [*map(add, old, new)]))
        return rows

    def newest(self, name: str, merged: Mapping[Key, Row]) -> dict[Values, Row]:
        """Return the exemplars of all series that have any: the newer of the siblings' and ours."""
        rows = {values: row for (family, values), row in merged.items() if family == name}
        for values, row in self.exemplars.items():
            rows[values] = newest(rows.get(values), row)
        return rows
