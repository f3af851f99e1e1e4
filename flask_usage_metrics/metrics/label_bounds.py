"""Bounds label values: unknown ones become _OTHER or ZZ, too many are folded into __other__."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from typing import Any

from flask_usage_metrics.metrics.families import LabelValues
from flask_usage_metrics.metrics.names import (
    FOLDED,
    OTHER_STATUS,
    UNKNOWN_COUNTRY,
    UNMATCHED,
)
from flask_usage_metrics.metrics.series import Series, Table
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.records.methods import OTHER_METHOD
from flask_usage_metrics.records.variables import variable_text
from flask_usage_metrics.runtime.texts import printable

Combination = tuple[Any, ...]
"""Method, endpoint, status, country and client of a record, and the values of the app's own labels.
"""

RequestSeries = tuple[Series, Series, Series, Series]
"""The series that a request counts in: of requests, durations, sizes and clients."""

_STATUSES = {status: str(status) for status in range(100, 600)}

_MOST_CHARACTERS = 128
"""Characters of a value of an app's own label; the rest is cut off."""


class LabelBounds:
    """Finds the series that a request counts in, and bounds how many there are.

    A table that is full folds labels that were not seen before into ``__other__``: of a request the
    app's own first, from the last to the first, then the country, then the endpoint. Each fold is
    counted.

    Args:
        shape: Its bound, the app's own labels, and those of the histogram.
        requests: By method, endpoint, status, country and the app's own labels.
        durations: By some of these; the same table if by all.
        sizes: By endpoint.
        clients: By kind of client, of which there are few.
        overflow: Folds, by label.
        methods: Methods that are labels of their own; there may be more later.

    Attributes:
        known: The series of combinations that were found before; `Shape.max_series` at most.
    """

    def __init__(
        self,
        shape: Shape,
        *,
        requests: Table,
        durations: Table,
        sizes: Table,
        clients: Table,
        overflow: Table,
        methods: Set[str],
    ) -> None:
        self.known: dict[Combination, RequestSeries] = {}
        self._max_known = shape.max_series
        self._names = shape.request_labels
        self._picked = [*map(self._names.index, shape.histogram_labels)]
        folds = (*shape.labels[::-1], "country", "endpoint")
        self._folds = [*map(self._names.index, folds)]
        self._requests = requests
        self._durations = durations
        self._sizes = sizes
        self._clients = clients
        self._overflow = overflow
        self._methods = methods
        for label in ("country", "endpoint", "exception", "consumer", *shape.labels):
            overflow.new_numbers((label,))

    def find(self, key: Combination) -> RequestSeries:
        """Return the series of a combination that is not in `known`, and add it if possible.

        It is not added if a full table folded a label: each fold is counted, and there is none once
        the series comes from another worker.
        """
        method, endpoint, status, country, client, *own = key
        values = (
            method if method in self._methods else OTHER_METHOD,
            UNMATCHED if endpoint is None else endpoint,
            _STATUSES.get(status, OTHER_STATUS),
            country or UNKNOWN_COUNTRY,
            *own,
        )
        requests = self._requests.series.get(values) or self._first_seen(values)
        durations = requests
        if self._durations is not self._requests:
            observed = tuple([requests.values[index] for index in self._picked])
            durations = self._durations.find(observed)
        sizes = self._sizes.fit(values[1:2], (FOLDED,))
        found = (requests, durations, sizes, self._clients.find((client,)))
        is_exact = (requests.values, sizes.values) == (values, values[1:2])
        # Clients choose methods, and apps status codes: `known` would fill up with unusual ones.
        is_usual = method in self._methods and status in _STATUSES
        if is_exact and is_usual and len(self.known) < self._max_known:
            self.known[key] = found
        return found

    def count(self, table: Table, label: str, values: LabelValues, folded: LabelValues) -> None:
        """Count one in a series, or in the folded one if it is not known and the table is full.

        Args:
            table: The table.
            label: The label that is folded.
            values: Label values of the series.
            folded: Label values of the folded one.
        """
        series = table.fit(values, folded)
        if series.values != values:
            self._overflow.new_numbers((label,))[0] += 1
        (series.new or series.start())[0] += 1

    def _first_seen(self, values: LabelValues) -> Series:
        """Return the series for labels of a request that were not seen before."""
        table = self._requests
        if not table.is_full():
            return table.find(values)
        kept, last = [*values], len(self._folds) - 1
        for number, position in enumerate(self._folds, 1):
            kept[position] = FOLDED
            self._overflow.new_numbers((self._names[position],))[0] += 1
            # Some room beyond the bound keeps what is folded later apart for a while longer.
            has_room = not table.is_full(spare=number * table.bound // (10 * last))
            if has_room or tuple(kept) in table.series:
                break
        return table.find(tuple(kept))


def own_values(variables: Mapping[str, Any], names: Iterable[str]) -> LabelValues:
    """Return the values of an app's own labels.

    Args:
        variables: ``g.track_var`` of a record.
        names: Keys of it.

    Returns:
        For each its text (see `variable_text`), at most 128 characters, control characters as
        U+FFFD; ``""`` if it has none.
    """
    return tuple([_label(variable_text(variables.get(name)) or "") for name in names])


def _label(text: str) -> str:
    if len(text) <= _MOST_CHARACTERS and text.isprintable():
        return text
    return printable(text[:_MOST_CHARACTERS])
