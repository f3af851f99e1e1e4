"""Parts of SQL statements: a `Filter` as conditions, a field as an expression, pages, sums."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import sqlalchemy as sa

from flask_usage_metrics.records.methods import METHODS, OTHER_METHOD
from flask_usage_metrics.records.query import Every, Filter, Order
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.variables import variable_key
from flask_usage_metrics.storage.sql.dialects.base import Dialect
from flask_usage_metrics.storage.sql.table import COLUMN_OF, IF_NULL

FIELDS = UsageRecord.__struct_fields__
_STARTED_AT, _ID = FIELDS.index("started_at"), FIELDS.index("id")


class Query:
    """Makes queries of one table; none of its methods touches the database.

    Args:
        table: The table of records, or one of sums, whose columns have the same names.
        dialect: Of the database it is in.
        methods: Methods that `group` tells apart.
    """

    def __init__(self, table: sa.Table, dialect: Dialect, methods: Set[str] = METHODS) -> None:
        self._table = table
        self._dialect = dialect
        self._methods = methods

    @property
    def moment(self) -> sa.ColumnElement[Any]:
        """The column of times, as an expression that compares and sorts; see `Dialect.moment`."""
        return self._dialect.moment(self._table.c.datetime)

    def field(self, name: str) -> Any:
        """Return the expression for a field of the record, with `IF_NULL` in place of null.

        Args:
            name: Of the field, or ``track_var.<key>``.
        """
        if name == "started_at":
            return self.moment
        key = variable_key(name)
        if key is not None:
            return self._dialect.variable(self._table.c.track_var, key)
        column = self._table.c[COLUMN_OF[name]]
        if name not in IF_NULL:
            return column
        # Not as a parameter, of which PostgreSQL would not know that it is the same in GROUP BY.
        return sa.func.coalesce(column, sa.literal_column(repr(IF_NULL[name]), column.type))

    def group(self, name: str) -> Any:
        """Return the expression to group by a field: unusual methods are one, as in `Summary`."""
        field = self.field(name)
        if name != "method":
            return field
        # Not as parameters either: see `field`.
        usual: list[sa.ColumnClause[Any]] = [
            sa.literal_column(repr(method)) for method in sorted(self._methods)
        ]
        other = sa.literal_column(repr(OTHER_METHOD), self._table.c.method.type)
        return sa.case((field.in_(usual), field), else_=other)

    def period(self, every: Every) -> sa.ColumnElement[str]:
        """Return the expression for the hour, day or month of a record; see `Dialect.period`."""
        return self._dialect.period(self.moment, every)

    def conditions(self, wanted: Filter) -> list[sa.ColumnElement[bool]]:
        """Return the conditions that all hold for the wanted records, and for no others."""
        moment = self.moment
        conditions: list[sa.ColumnElement[bool]] = [moment.is_not(None)]
        if wanted.since is not None:
            conditions.append(moment >= self._dialect.bind_moment(wanted.since))
        if wanted.until is not None:
            conditions.append(moment < self._dialect.bind_moment(wanted.until))
        for field, values in wanted.any_of.items():
            conditions.append(self.any_of(field, values))
        # Columns as they are, where null cannot be meant: of an expression the database has no
        # statistics, and would rather sort a million rows than walk along the index.
        if wanted.status_classes is not None:
            status = self._table.c[COLUMN_OF["status"]]
            conditions.append(
                sa.or_(
                    sa.false(),
                    *(
                        status.between(100 * digit, 100 * digit + 99)
                        for digit in sorted(wanted.status_classes)
                    ),
                )
            )
        if wanted.path_prefixes is not None and "" not in wanted.path_prefixes:
            # Not LIKE: it is blind to case, and % and _ mean themselves in a path.
            path = self._table.c[COLUMN_OF["path"]]
            conditions.append(
                sa.or_(
                    sa.false(),
                    *(
                        sa.func.substr(path, 1, len(prefix)) == prefix
                        for prefix in wanted.path_prefixes
                        if _fits(prefix)
                    ),
                )
            )
        return conditions

    def any_of(self, field: str, values: Sequence[Any]) -> sa.ColumnElement[bool]:
        """Return the condition that a field is one of the values.

        Args:
            field: One of `EQUALITY_FILTERS`, or ``track_var.<key>``.
            values: None means unknown; a value of another type than the field's matches nothing.
        """
        # A column as it is: see `conditions`.
        column = self._table.c[COLUMN_OF[field]] if field in COLUMN_OF else self.field(field)
        # Only values of the field's type: databases would take "200" for 200 in some places.
        kind: type | tuple[type, ...] = int if field == "status" else str
        present = [value for value in values if isinstance(value, kind) and _fits(value)]
        conditions = [self._dialect.any_of(column, present)] if present else []
        if IF_NULL[field] in present if field in IF_NULL else None in values:
            conditions.append(column.is_(None))
        return sa.or_(sa.false(), *conditions)

    # -- pages ----------------------------------------------------------------------------------

    def page(self, wanted: Filter, order: Order) -> sa.Select[Any]:
        """Return the query for the wanted records by (started_at, id), without a limit.

        Rows of flask-track-usage have no record id. Null sorts before all ids, as does the id that
        `to_record` makes of their primary key.

        Returns:
            A query for rows of the primary key, the whole URL (null unless the row is
            flask-track-usage's), and the values of `FIELDS`.
        """
        keys = self._keys()
        columns = self._table.c
        url = sa.case((columns.scheme.is_(None), columns.url))
        turn = self._dialect.ascending if order == "oldest" else self._dialect.descending
        return (
            sa.select(keys[2], url, *map(self.field, FIELDS))
            .where(*self.conditions(wanted))
            .order_by(*map(turn, keys))
        )

    def beyond(self, order: Order, row: Sequence[Any]) -> sa.ColumnElement[bool]:
        """Return the condition for the rows after a given one (keyset pagination).

        Args:
            order: As given to `page`.
            row: The last one of a page.
        """
        moment, record_id, key = self._keys()
        last_key, _, *values = row
        last_moment, last_record_id = values[_STARTED_AT], values[_ID]
        tied: sa.ColumnElement[bool]
        if order == "oldest":
            if last_record_id is None:
                tied = sa.or_(record_id.is_not(None), key > last_key)
            else:
                tied = record_id > last_record_id
            return sa.and_(moment >= last_moment, sa.or_(moment > last_moment, tied))
        if last_record_id is None:
            tied = sa.and_(record_id.is_(None), key < last_key)
        else:
            tied = sa.or_(record_id.is_(None), record_id < last_record_id)
        return sa.and_(moment <= last_moment, sa.or_(moment < last_moment, tied))

    def _keys(self) -> tuple[Any, Any, Any]:
        columns = self._table.c
        return self.moment, columns.record_id, columns.id

    # -- sums -----------------------------------------------------------------------------------

    def sums(
        self,
        conditions: Sequence[sa.ColumnElement[bool]],
        fields: Sequence[str],
        every: Every | None,
        bounds: Sequence[float],
        *,
        visitors: bool,
    ) -> sa.Select[Any]:
        """Return the query for sums by group.

        Args:
            conditions: For the rows to add up.
            fields: Fields to group by.
            every: Period to group by as well; None: none.
            bounds: Upper bounds of the latency buckets, in seconds, ascending.
            visitors: Whether to count different visitors.

        Returns:
            A query for rows of the period, if any; the fields; requests, errors (status 500 to
            599), bytes sent, seconds, streams, seconds until their first bytes; visitors, or null;
            and for each bound the number of requests that took at most so long.
        """
        groups = [self.group(field) for field in fields]
        if every is not None:
            groups.insert(0, self.period(every))
        status, duration = self.field("status"), self.field("duration_seconds")
        first_byte = self.field("first_byte_seconds")
        # Only when asked for: it has the database keep each visitor of each group.
        distinct = sa.func.count(self.field("visitor").distinct()) if visitors else sa.null()
        return (
            sa.select(
                *groups,
                sa.func.count(),
                sa.func.sum(sa.case((status.between(500, 599), 1), else_=0)),
                sa.func.sum(self.field("bytes_sent")),
                sa.func.sum(duration),
                sa.func.count(first_byte),
                sa.func.coalesce(sa.func.sum(first_byte), 0.0),
                distinct,
                *(sa.func.sum(sa.case((duration <= bound, 1), else_=0)) for bound in bounds),
            )
            .select_from(self._table)
            .where(*conditions)
            .group_by(*groups)
        )


def _fits(value: Any) -> bool:
    """Tell whether a record can have the value: a text without NUL and surrogates, 64 bits."""
    if isinstance(value, str):
        return "\0" not in value and value.encode(errors="ignore").decode() == value
    return -(2**63) <= int(value) < 2**63
