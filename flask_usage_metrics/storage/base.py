"""The contract `Storage`: a writer whose records can also be read, summed up and deleted."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence, Set
from datetime import datetime, timedelta, timezone
from itertools import islice
from math import inf
from typing import Any

import msgspec

from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.records.methods import METHODS
from flask_usage_metrics.records.query import Every, Filter, Order, as_tuple, as_utc, check_grouping
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.records.summary import BUCKETS, Summary, summarize_records
from flask_usage_metrics.storage.compat import as_usage_item
from flask_usage_metrics.storage.writer import Writer
from flask_usage_metrics.summarization import Summation, find_summation, sum_up


class Storage(Writer):
    """A storage that records can be read from; methods may be called by any thread.

    A subclass implements `write`, `select`, `prune` and `delete`; everything else is derived from
    these, and may be overridden by something faster. A subclass written for flask-track-usage
    overrides only `set_up`, `store` and `_get_usage`: `get_usage` is all that reads it.

    Attributes:
        bounds: Upper bounds of the buckets that quantiles are estimated from, seconds, ascending;
            in an app those of its histogram, set when the app is set up.
        pseudonyms: Returns the pseudonyms a user's records may be kept under instead of the name,
            set when the app is set up; None: there are none.
        known_methods: Returns the methods that sums tell apart, set when the app is set up; None:
            those of HTTP.
        is_of_app: Whether this process writes here, set when an app is set up with it, and by
            `write`. Then what is not there yet holds no records; else to read it is an error, as
            its name may be wrong.
    """

    bounds: Sequence[float] = BUCKETS
    is_of_app: bool = False
    pseudonyms: Callable[[str], Sequence[str]] | None = None
    known_methods: Callable[[], Set[str]] | None = None
    _has_sums = True

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        """Yield the wanted records by (started_at, id), each id once; for subclasses.

        Args:
            wanted: Which records.
            order: ``"oldest"`` or ``"newest"`` first.
            limit: Most records to yield, >= 0; None: all.

        Raises:
            StorageUnavailable: The storage cannot be read now; raised when it is iterated.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer records()")

    def records(
        self,
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        order: Order = "oldest",
        limit: int | None = None,
        **filters: Any,
    ) -> Iterator[UsageRecord]:
        """Yield the records with ``since <= started_at < until``, by (started_at, id).

        Memory does not grow with the number of records, unless the storage says so.

        Args:
            since: Start of the range, included; naive means UTC; None: from the first.
            until: End of the range, not included; naive means UTC; None: to the last.
            order: ``"oldest"`` or ``"newest"`` first.
            limit: Most records to yield; None: all.
            **filters: A field and its value, or a list of values of which any matches: endpoint,
                method, status, country, client, path, username, blueprint, visitor, trace_id,
                remote_addr, consumer, url, user_agent, language, app, utm_source, utm_medium,
                utm_campaign, ref; also ``status_class="5xx"`` and ``path_prefix="/api/"``, and
                ``**{"track_var.plan": "gold"}`` for any key of ``g.track_var``, with a text, a
                number or a bool. None means unknown. An address may be spelled in any way; a
                user's name also matches its pseudonyms.

        Raises:
            StorageUnavailable: The storage cannot be read now.
            TypeError: A filter is not known.
            ValueError: The order or a status class is not known, or the limit is negative.
        """
        if order not in ("oldest", "newest"):
            raise ValueError(f"order must be 'oldest' or 'newest', not {order!r}")
        if limit is not None and limit < 0:
            raise ValueError(f"limit must not be negative, but it is {limit}")
        return self.select(self.wanted(since, until, filters), order, limit)

    def wanted(
        self, since: datetime | None, until: datetime | None, conditions: dict[str, Any]
    ) -> Filter:
        """Return the arguments of a read call as a `Filter`, checked; for subclasses.

        Args:
            since: As in `records`.
            until: As in `records`.
            conditions: The filters, as in `records`. To the values of addresses and user names the
                result adds their other spellings and pseudonyms.

        Raises:
            TypeError: A filter is not known.
            ValueError: A status class is not known.
        """
        wanted = Filter.parse(since, until, conditions)
        aliases = {
            field: (*values, *(alias for value in values for alias in self._aliases(field, value)))
            for field, values in wanted.any_of.items()
        }
        return msgspec.structs.replace(wanted, any_of=aliases)

    def _aliases(self, field: str, value: Any) -> Sequence[Any]:
        if isinstance(value, str):
            if field == "remote_addr":
                address = normalise(value)
                return () if address is None else (address,)
            if field == "username" and self.pseudonyms is not None:
                return as_tuple(self.pseudonyms(value))
        return ()

    def count(
        self, since: datetime | None = None, until: datetime | None = None, **filters: Any
    ) -> int:
        """Return the number of records that `records` would yield; raises as that does."""
        return sum(1 for _ in self.records(since, until, **filters))

    def summarize(
        self,
        by: Collection[str] = ("endpoint",),
        since: datetime | None = None,
        until: datetime | None = None,
        *,
        every: Every | None = None,
        visitors: bool = False,
        **filters: Any,
    ) -> list[Summary]:
        """Add up the records by group, and by hour, day or month (UTC) if asked for.

        Args:
            by: Fields to group by, those of the filters, browser, platform, exception and rule;
                empty: one group. The value of a ``"track_var.plan"`` is a text, or None: see
                `variable_text`.
            since: As in `records`.
            until: As in `records`.
            every: ``"hour"``, ``"day"``, ``"month"`` or None.
            visitors: Also count the different identifiers of visitors, which costs more time and
                memory. Those of ``TRACK_USAGE_VISITORS="daily"`` change each day: over several
                days the figure is a sum of daily ones, which ``every="day"`` tells apart.
            **filters: As in `records`.

        Returns:
            A `Summary` for each group that has records: by start, then the busiest first.

        Raises:
            StorageUnavailable: The storage cannot be read now.
            TypeError: A filter is not known.
            ValueError: A field or period is not known.
        """
        fields = check_grouping(by, every)
        wanted = self.wanted(since, until, filters)
        if visitors:
            return self.aggregate(wanted, fields, every, visitors=True)
        # Without the keyword: a subclass may have been written when there was none.
        return self.aggregate(wanted, fields, every)

    def aggregate(
        self,
        wanted: Filter,
        fields: Sequence[str],
        every: Every | None,
        *,
        visitors: bool = False,
    ) -> list[Summary]:
        """Return what `summarize` does, of checked arguments; for subclasses that are faster.

        Args:
            wanted: Which records.
            fields: Fields to group by.
            every: Period to group by as well; None: none.
            visitors: Whether to count different visitors.
        """
        records = self.select(wanted, "oldest", None)
        return summarize_records(
            records, fields, every, self.bounds, visitors=visitors, methods=self._known_methods()
        )

    def _known_methods(self) -> Set[str]:
        return METHODS if self.known_methods is None else self.known_methods()

    def get_sum(
        self,
        hook: Summation | str,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        limit: int = 500,
        page: int = 1,
        target: str | None = None,
    ) -> dict[str, list[dict[str, Any]]]:
        """Return flask-track-usage's sums: hits and bytes by hour, day and month (UTC).

        Computed by `summarize` at every call, whether or not the storage was given the hook: so
        they are right however many processes write. Erased records are in none, pruned ones where
        `summarize` still counts them. Periods are summed as a whole. Memory grows with the number
        of rows that there are, whatever the limit.

        Args:
            hook: One of `flask_usage_metrics.summarization`, or its name: ``sumUrl`` (the whole
                URL), ``sumRemote``, ``sumUserAgent`` (the header), ``sumLanguage``, ``sumServer``
                (the app), ``sumVisitor``, ``sumGeo`` (the country). An s may follow.
            start_date: Without `end_date`: the hour, the day and the month that contain it. With
                it: those that begin then or later. Naive means UTC; None: from the first.
            end_date: Those that begin then or earlier. Naive means UTC; None: to the last.
            limit: Rows a page, of each list; >= 0.
            page: Page number, from 1; smaller ones mean 1.
            target: Only this value, an address spelled in any way; None: all values.

        Returns:
            For ``"hour"``, ``"day"`` and ``"month"`` a list, the newest first, then the busiest,
            of dicts with the keys date (start of the period, naive UTC), hits, transfer (bytes of
            response bodies), and one of url, remote_addr, user_agent_string, language,
            server_name, visitor, country. Records without a value for it are left out.

        Raises:
            NotImplementedError: There is no such hook.
            StorageUnavailable: The storage cannot be read now.
            ValueError: The limit is negative.
        """
        summation = find_summation(hook)
        return sum_up(self.summarize, summation, start_date, end_date, limit, page, target)

    def get_usage(
        self,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        limit: int = 500,
        page: int = 1,
    ) -> list[dict[str, Any]]:
        """Return records in flask-track-usage's shape, newest first.

        Args:
            start_date: Start of the range, included; naive means UTC.
            end_date: End of the range, **included**; naive means UTC.
            limit: Records a page.
            page: Page number, from 1; smaller ones mean 1.

        Returns:
            Dicts with the keys url, user_agent (a dict of browser, language, platform, version),
            blueprint, view_args, status, remote_addr, xforwardedfor, authorization, ip_info,
            path, speed (seconds), date (naive UTC), username, track_var. view_args, ip_info and
            track_var are JSON texts, or None if empty; `records` has the objects.

        Raises:
            StorageUnavailable: The storage cannot be read now.
            TypeError: A subclass's ``_get_usage`` returns something else than a list of dicts.
        """
        items = self._get_usage(start_date, end_date, limit, page)
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise TypeError(f"{type(self).__name__}._get_usage must return a list of dicts")
        return items

    def _get_usage(
        self,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        limit: int = 500,
        page: int = 1,
    ) -> list[dict[str, Any]]:
        end = as_utc(end_date)
        # The inclusive end as that of a half-open range: times have microseconds. There is none
        # after the last moment a datetime can hold, which people pass for "no end".
        last = datetime.max.replace(tzinfo=timezone.utc)
        until = None if end is None or end == last else end + timedelta(microseconds=1)
        first = (max(page, 1) - 1) * limit
        records = self.records(start_date, until, order="newest", limit=first + limit)
        return [as_usage_item(record) for record in islice(records, first, None)]

    def maintain(self, keep: timedelta | None, now: datetime) -> float:
        """Prune once an hour; see `Writer.maintain`."""
        if keep is None:
            return inf
        before = now - keep
        # Counted first: to prune may rewrite a file while its writers wait, even for no record.
        if self.count(until=before):
            self.prune(before)
        return 3600.0

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before``, and return how many were deleted.

        Their hourly and daily sums in a SQL storage stay, for `summarize`.

        Args:
            before: Naive means UTC.

        Raises:
            StorageUnavailable: The storage cannot be reached now; some may be deleted.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer prune()")

    def erase(
        self,
        *,
        username: str | Collection[str] | msgspec.UnsetType = msgspec.UNSET,
        visitor: str | Collection[str] | msgspec.UnsetType = msgspec.UNSET,
        remote_addr: str | Collection[str] | msgspec.UnsetType = msgspec.UNSET,
    ) -> int:
        """Delete all records of somebody (GDPR, Art. 17), and return how many were deleted.

        These are the records that `records` yields for the same arguments: look at `count` first.
        Call `TrackUsage.flush` before: records that wait to be written are not erased.

        Args:
            username: A name, or a list of which any matches, as in `records`; if several arguments
                are given, all must match.
            visitor: Likewise, identifiers of visitors.
            remote_addr: Likewise, addresses.

        Raises:
            NotImplementedError: The storage does not offer it.
            StorageUnavailable: The storage cannot be reached now. Some records may be deleted:
                call it again.
            TypeError: A value is no text, so no record has it.
            ValueError: No argument is given, or one is None or an empty list: that is nobody.
        """
        given = {"username": username, "visitor": visitor, "remote_addr": remote_addr}
        wanted = self.wanted(
            None,
            None,
            {field: value for field, value in given.items() if value is not msgspec.UNSET},
        )
        if not wanted.any_of:
            raise ValueError("erase() needs a username, a visitor or a remote_addr")
        # Checked after pseudonyms were added: these must not be somebody else's, either.
        for field, values in wanted.any_of.items():
            if not values:
                raise ValueError(f"{field} must not be an empty list")
            for value in values:
                if value is None:
                    raise ValueError(f"{field} must not be None, which is nobody's")
                if not isinstance(value, str):
                    raise TypeError(f"{field} must be a str, not {type(value).__name__}")
        return self.delete(wanted)

    def delete(self, wanted: Filter) -> int:
        """Delete the wanted records, and return how many were deleted; for subclasses.

        Raises:
            StorageUnavailable: The storage cannot be reached now; some may be deleted.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer erase()")
