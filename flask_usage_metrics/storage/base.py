"""The contract of storages: what is written to, and what can be read from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from inspect import signature
from itertools import islice
from math import inf
from typing import Any, cast

import msgspec

from flask_usage_metrics.address import normalise
from flask_usage_metrics.errors import ConfigError, RecordsRejected
from flask_usage_metrics.query import (
    BUCKETS,
    Every,
    Filter,
    Order,
    Summary,
    as_tuple,
    as_utc,
    check_grouping,
    summarize_records,
)
from flask_usage_metrics.record import UsageRecord
from flask_usage_metrics.storage.hooks import as_hooks
from flask_usage_metrics.storage.shapes import as_dict, as_usage_item
from flask_usage_metrics.summarization import Summation, find_summation, sum_up


class _ClassName:
    """The name of a storage that was given none: that of its class."""

    def __get__(self, instance: object, owner: type) -> str:
        return _clean_name(owner.__name__.lower())


class Writer:
    """Something records are written to.

    A subclass overrides either `write`, which takes a batch and is asked again after a failure,
    or, as with flask-track-usage, `set_up` and `store`, which takes one dict and is asked once.

    Args:
        *args: Those of `set_up`.
        hooks: Functions to call for each record, as `call_hooks` does. A storage that can be read
            also takes what flask-track-usage calls hooks, such as ``sumUrl`` of
            `flask_usage_metrics.summarization` or ``"sumUrl"``, though `Storage.get_sum` does
            without. One of these or a list.
        **kwargs: Those of `set_up`, which is given `hooks` too if it names them.

    Attributes:
        name: Short name, the value of the label ``sink``; it never holds an address or a secret.
            Unless a subclass or an instance sets one: the name of its class in lower case.

    Raises:
        ConfigError: A hook is none of these.
    """

    name: str = cast(str, _ClassName())
    # For subclasses that do not call our constructor.
    _functions: Sequence[Callable[..., Any]] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        parameters = signature(self.set_up)
        if "hooks" in parameters.parameters:
            # By position too, as in SQLStorage(engine, metadata, table_name, db, hooks).
            hooks = as_hooks(parameters.bind(*args, **kwargs).arguments.get("hooks"))
        else:
            hooks = as_hooks(kwargs.pop("hooks", None))
        for hook in hooks:
            if isinstance(hook, Summation) and not isinstance(self, Storage):
                raise ConfigError(
                    f"hooks: {type(self).__name__} cannot be read, so there is no {hook.name} of it"
                )
        self._functions = [hook for hook in hooks if not isinstance(hook, Summation)]
        self.set_up(*args, **kwargs)

    def set_up(self, *args: Any, **kwargs: Any) -> None:
        """Take the constructor's arguments; for subclasses."""

    def store(self, data: dict[str, Any]) -> Any:
        """Keep one record, given as the dict of `as_dict`; for subclasses."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither store nor write")

    def __call__(self, data: dict[str, Any]) -> Any:
        """Keep one record, as `store` does."""
        return self.store(data)

    def write(self, batch: Sequence[UsageRecord]) -> None:
        """Keep a batch; called by one thread at a time, never by a request.

        Writing a record again that is already kept must change nothing: its id tells.

        Raises:
            StorageUnavailable: Nothing was written; the same batch will be offered again.
            RecordsRejected: The named records can never be written; all others were.
            Exception: Nothing was written. The batch is offered again in parts, to find the
                record that is the cause.
        """
        rejected: list[int] = []
        reason = ""
        for position, record in enumerate(batch):
            try:
                self.store(as_dict(record))
            except BaseException as error:  # noqa: BLE001 - it must not end the writing thread
                reason = reason or type(error).__name__
                rejected.append(position)
        if rejected:
            raise RecordsRejected(rejected, reason)

    def call_hooks(
        self, batch: Sequence[UsageRecord], report: Callable[[str, BaseException], None]
    ) -> None:
        """Call the functions among the hooks for each record of a batch that was kept.

        As in flask-track-usage, ``hook(**data)`` with the dict of `as_dict`, made afresh, and
        ``_parent_class_name`` and ``_parent_self``, this storage; but in the thread that writes,
        without Flask's context. The next batch waits meanwhile. What a hook raises changes nothing
        for the record, the other hooks and the other records.

        Each record that was kept is given to each hook: once, but once more if it is written once
        more, such as after the process was killed before the batch was done with. Its id tells.

        Args:
            batch: In the order they were written in.
            report: Called with a hook's name and what it raised.
        """
        if not self._functions:
            return
        parent = {"_parent_class_name": type(self).__name__, "_parent_self": self}
        for record in batch:
            for function in self._functions:
                try:
                    function(**as_dict(record), **parent)
                except BaseException as error:  # noqa: BLE001 - it must not end the writing thread
                    report(_callable_name(function), error)

    @property
    def identity(self) -> str:
        """What tells this storage from others of its kind, the same in every process."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.name}"

    def bind_app(self, app: Any) -> None:
        """Take the Flask app that is tracked, for what can be had in its context only."""

    def flush(self) -> None:
        """Hand over what the storage itself holds back, if anything."""

    def tend(self, keep: timedelta | None, now: datetime) -> float:
        """Do a small piece of upkeep, in the thread that writes; return when there is more to do.

        Args:
            keep: How long records are kept; None: for ever.
            now: Aware UTC.

        Returns:
            Seconds until it is to be called again; less than one if there is more to do.

        Raises:
            StorageUnavailable: The storage cannot be reached now.
        """
        return inf

    def close(self) -> None:
        """Give back connections and files; the next use opens them again."""

    def reset_after_fork(self) -> None:
        """Forget, without closing, what must not be shared with the parent process."""


class CallableWriter(Writer):
    """A plain callable that takes one dict.

    Args:
        function: Called once a record; what it raises counts as a failed record.
    """

    def set_up(self, function: Callable[[dict[str, Any]], Any]) -> None:
        """Keep the callable."""
        self._function = function
        self.name = _callable_name(function)

    def store(self, data: dict[str, Any]) -> Any:
        """Call the callable."""
        return self._function(data)


class Storage(Writer):
    """Something records can also be read from.

    A subclass implements `select`, `prune` and `delete`; everything else is derived from these,
    and may be overridden by something faster. A subclass that came from flask-track-usage
    overrides only `set_up`, `store` and `_get_usage`; then only `get_usage` can be read.

    Attributes:
        bounds: Upper bounds of the buckets that quantiles are estimated from, in seconds.
        pseudonyms: Returns other names a user's records may be kept under; set by the extension
            when user names are pseudonymised.
    """

    bounds: Sequence[float] = BUCKETS
    pseudonyms: Callable[[str], Sequence[str]] | None = None

    def select(self, wanted: Filter, order: Order, limit: int | None) -> Iterator[UsageRecord]:
        """Yield the wanted records by (started_at, id); for subclasses."""
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
            limit: At most so many; None: all.
            **filters: Field = value, or = a list of which any may hold: endpoint, method, status,
                country, client, path, username, blueprint, visitor, trace_id, remote_addr,
                consumer, url, user_agent, language, app; also ``status_class="5xx"`` and
                ``path_prefix="/api/"``. None means unknown. An address may be spelled in any way;
                a user's name also finds what is kept under its pseudonyms.

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
        """Check the arguments of a read call; for subclasses that override one.

        Args:
            since: As in `records`.
            until: As in `records`.
            conditions: The filters. An address or a user name is also looked for under what else
                the storage may hold it as.

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
        """Return how many records `records` would yield."""
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
                empty: one group.
            since: As in `records`.
            until: As in `records`.
            every: ``"hour"``, ``"day"``, ``"month"`` or None.
            visitors: Also count the different identifiers of visitors, which costs more time and
                memory. Those of ``TRACK_USAGE_VISITORS="daily"`` change each day: over several
                days the figure is a sum of daily ones. With ``every="day"`` they are seen apart.
            **filters: As in `records`.

        Returns:
            One `Summary` a group that has records: by start, then the busiest first.

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
        """Do the work of `summarize`; for subclasses that can do it faster."""
        records = self.select(wanted, "oldest", None)
        return summarize_records(records, fields, every, self.bounds, visitors=visitors)

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

        They are made by `summarize` when this is called, whether or not the storage was given the
        hook: so they are right however many processes write. An erased record is in none, and a
        pruned one only where `summarize` has it still. Of an hour, day or month that is meant all
        records count. Memory grows with the number of rows there are, whatever the limit.

        Args:
            hook: One of `flask_usage_metrics.summarization`, or its name: ``sumUrl`` (the whole
                URL), ``sumRemote``, ``sumUserAgent`` (the header), ``sumLanguage``, ``sumServer``
                (the app), ``sumVisitor``, ``sumGeo`` (the country). An s may follow.
            start_date: Without `end_date`: the hour, the day and the month that contain it. With
                it: those that begin then or later. Naive means UTC; None: from the first.
            end_date: Those that begin then or earlier. Naive means UTC; None: to the last.
            limit: Rows a page, of each list.
            page: Page number, from 1; smaller ones mean 1.
            target: Only this value, an address spelled in any way; None: all that are known.

        Returns:
            For ``"hour"``, ``"day"`` and ``"month"`` a list, the newest first, then the busiest,
            of dicts with the keys date (its start, naive UTC), hits, transfer (bytes of the
            responses' bodies), and url, remote_addr, user_agent_string, language, server_name,
            visitor or country. Records for which that is unknown are in none.

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
            path, speed (seconds), date (naive UTC), username, track_var.

        Raises:
            StorageUnavailable: The storage cannot be read now.
        """
        return self._get_usage(start_date, end_date, limit, page)

    def _get_usage(
        self,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        limit: int = 500,
        page: int = 1,
    ) -> list[dict[str, Any]]:
        end = as_utc(end_date)
        # The inclusive end in terms of a half-open range: times have microseconds. After the last
        # moment there is, which people pass for "no end", there is no other.
        last = datetime.max.replace(tzinfo=timezone.utc)
        until = None if end is None or end == last else end + timedelta(microseconds=1)
        first = (max(page, 1) - 1) * limit
        records = self.records(start_date, until, order="newest", limit=first + limit)
        return [as_usage_item(record) for record in islice(records, first, None)]

    def tend(self, keep: timedelta | None, now: datetime) -> float:
        """Prune what is older than it is to be kept, once an hour; see `Writer.tend`."""
        if keep is None:
            return inf
        before = now - keep
        # Looked at first: a file may be written anew, and its writers wait, even for nothing.
        if self.count(until=before):
            self.prune(before)
        return 3600.0

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before`` and return how many these were.

        What a SQL storage has added up of them by hour and day stays: see `summarize`.

        Raises:
            StorageUnavailable: The storage cannot be reached now.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer prune()")

    def erase(
        self,
        *,
        username: str | Collection[str] | msgspec.UnsetType = msgspec.UNSET,
        visitor: str | Collection[str] | msgspec.UnsetType = msgspec.UNSET,
        remote_addr: str | Collection[str] | msgspec.UnsetType = msgspec.UNSET,
    ) -> int:
        """Delete all records of somebody (GDPR, Art. 17) and return how many these were.

        These are exactly the records that `records` yields for the same arguments: look at `count`
        first. Call `TrackUsage.flush` before: what still waits to be written is not erased.

        Args:
            username: A name, or a list of which any may hold, as in `records`; given together with
                others, all must hold.
            visitor: Likewise, identifiers of visitors.
            remote_addr: Likewise, addresses.

        Raises:
            NotImplementedError: The storage does not offer it.
            StorageUnavailable: The storage cannot be reached now. Some records may be deleted:
                call it again.
            TypeError: A value is no text: it would be found nowhere.
            ValueError: Nothing is given, or None or an empty list: who is unknown is nobody.
        """
        given = {"username": username, "visitor": visitor, "remote_addr": remote_addr}
        wanted = self.wanted(
            None,
            None,
            {field: value for field, value in given.items() if value is not msgspec.UNSET},
        )
        if not wanted.any_of:
            raise ValueError("erase() needs a username, a visitor or a remote_addr")
        # Looked at after aliases were added: none of these may be somebody else, either.
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
        """Delete the wanted records and return how many these were; for subclasses.

        Raises:
            StorageUnavailable: The storage cannot be reached now; some may be deleted.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer erase()")


def _callable_name(function: Callable[..., Any]) -> str:
    return _clean_name(str(getattr(function, "__name__", type(function).__name__)))


def _clean_name(name: str) -> str:
    return "".join(character if character.isprintable() else "_" for character in name[:64])
