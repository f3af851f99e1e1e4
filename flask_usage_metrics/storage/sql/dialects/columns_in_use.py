"""Which columns of the records' table get values at all: statements name no others."""

from __future__ import annotations

from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, COLUMNS, Columns


class ColumnsInUse:
    """The columns that had a value in any batch so far; they only become more.

    For databases that take a batch as JSON, where every column costs time.
    """

    def __init__(self) -> None:
        self._columns = (False,) * len(COLUMNS)

    def with_rows(self, columns: Columns) -> tuple[bool, ...]:
        """Return for each of `COLUMNS` whether it has a value in this batch, or had one before."""
        self._columns = tuple(
            known or column.count(None) < len(column)
            for known, column in zip(self._columns, columns, strict=True)
        )
        return self._columns


class ParameterLayout:
    """Which columns are parameters of an INSERT: once a statement, once a row, or not at all.

    For databases that take a batch as parameters: binding a text is dear, so a value that all rows
    of a batch have is bound once. Columns move from `blank` to `shared` to `own` and never back, so
    that the statements seldom change: to compile one takes as long as to run it.

    Attributes:
        blank: Positions in `COLUMNS` of those that never had a value; statements leave them out.
        shared: Positions of those that never had two values in one batch.
        own: Positions of the others; one at least, for a statement to have rows.
    """

    def __init__(self) -> None:
        key = COLUMN_NAMES.index("record_id")
        self.blank = tuple(position for position in range(len(COLUMN_NAMES)) if position != key)
        self.shared: tuple[int, ...] = ()
        self.own: tuple[int, ...] = (key,)

    def learn(self, columns: Columns) -> bool:
        """Take a batch into account; return whether the layout changed."""
        differ = {
            position
            for position in self.blank + self.shared
            if columns[position].count(columns[position][0]) < len(columns[position])
        }
        filled = {position for position in self.blank if columns[position][0] is not None}
        if not differ and not filled:
            return False
        self.own = (*self.own, *differ)
        self.shared = tuple({*self.shared, *filled} - differ)
        self.blank = tuple({*self.blank} - filled - differ)
        return True
