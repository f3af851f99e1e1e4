"""The contract of storages: what is written to, and what can be read from."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import datetime, timedelta, timezone
from itertools import islice
from typing import Any, cast
from urllib.parse import parse_qsl

from flask_usage_metrics.errors import RecordsRejected
from flask_usage_metrics.query import (
    BUCKETS,
    Every,
    Filter,
    Order,
    Summary,
    as_utc,
    check_grouping,
    summarize_records,
)
from flask_usage_metrics.record import UsageRecord


class UserAgent:
    """The client as flask-track-usage described it; prints as the User-Agent header.

    Attributes:
        browser: Such as ``"Chrome"``, or None.
        version: Major version, or None.
        platform: Operating system, such as ``"Windows"``, or None.
        language: First choice of Accept-Language, or None.
        string: The header; ``""`` if none came.
    """

    __slots__ = ("browser", "language", "platform", "string", "version")

    def __init__(self, record: UsageRecord) -> None:
        self.browser = record.browser
        self.version = record.browser_version
        self.platform = record.platform
        self.language = record.language
        self.string = record.user_agent or ""

    def __str__(self) -> str:
        return self.string

    def __repr__(self) -> str:
        return f"<UserAgent {self.browser!r}/{self.version!r}>"


def as_dict(record: UsageRecord) -> dict[str, Any]:
    """Return a record as the dict a custom storage is given, made afresh.

    It has the 18 keys of flask-track-usage, and every field of `UsageRecord` under its own name
    (``user_agent`` is the `UserAgent`, which prints as the header).
    """
    fields = {name: getattr(record, name) for name in UsageRecord.__struct_fields__}
    for name in ("view_args", "ip_info", "track_var"):
        fields[name] = _copy(fields[name])
    url_args: dict[str, str] = {}
    for key, value in parse_qsl(record.query, keep_blank_values=True):
        url_args.setdefault(key, value)
    fields.update(
        url=record.url,
        user_agent=UserAgent(record),
        server_name=record.app,
        xforwardedfor=record.forwarded_for,
        speed=record.duration_seconds,
        date=int(record.started_at.timestamp()),
        content_length=record.bytes_sent,
        request=f"{record.method} {record.url} {record.protocol}",
        url_args=url_args,
    )
    return fields


class _ClassName:
    """The name of a storage that was given none: that of its class."""

    def __get__(self, instance: object, owner: type) -> str:
        return _clean_name(owner.__name__.lower())


class Writer:
    """Something records are written to.

    A subclass overrides either `write`, which takes a batch and is asked again after a failure,
    or, as with flask-track-usage, `set_up` and `store`, which takes one dict and is asked once.

    Attributes:
        name: Short name, the value of the label ``sink``; it never holds an address or a secret.
            Unless a subclass or an instance sets one: the name of its class in lower case.
    """

    name: str = cast(str, _ClassName())

    def __init__(self, *args: Any, **kwargs: Any) -> None:
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

    @property
    def identity(self) -> str:
        """What tells this storage from others of its kind, the same in every process."""
        return f"{type(self).__module__}.{type(self).__qualname__} {self.name}"

    def bind_app(self, app: Any) -> None:
        """Take the Flask app that is tracked, for what can be had in its context only."""

    def flush(self) -> None:
        """Hand over what the storage itself holds back, if anything."""

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
        self.name = _clean_name(str(getattr(function, "__name__", type(function).__name__)))

    def store(self, data: dict[str, Any]) -> Any:
        """Call the callable."""
        return self._function(data)


class Storage(Writer):
    """Something records can also be read from.

    A subclass implements `select` and `prune`; everything else is derived from these, and may be
    overridden by something faster. A subclass that came from flask-track-usage overrides only
    `set_up`, `store` and `_get_usage`; then only `get_usage` can be read.

    Attributes:
        bounds: Upper bounds of the buckets that quantiles are estimated from, in seconds.
    """

    bounds: Sequence[float] = BUCKETS

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
                country, client, path, username, blueprint, visitor, trace_id; also
                ``status_class="5xx"`` and ``path_prefix="/api/"``. None means unknown.

        Raises:
            StorageUnavailable: The storage cannot be read now.
            TypeError: A filter is not known.
            ValueError: The order or a status class is not known, or the limit is negative.
        """
        if order not in ("oldest", "newest"):
            raise ValueError(f"order must be 'oldest' or 'newest', not {order!r}")
        if limit is not None and limit < 0:
            raise ValueError(f"limit must not be negative, but it is {limit}")
        return self.select(Filter.parse(since, until, filters), order, limit)

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
        **filters: Any,
    ) -> list[Summary]:
        """Add up the records by group, and by hour, day or month (UTC) if asked for.

        Args:
            by: Fields to group by; empty: one group.
            since: As in `records`.
            until: As in `records`.
            every: ``"hour"``, ``"day"``, ``"month"`` or None.
            **filters: As in `records`.

        Returns:
            One `Summary` a group that has records: by start, then the busiest first.

        Raises:
            StorageUnavailable: The storage cannot be read now.
            TypeError: A filter is not known.
            ValueError: A field or period is not known.
        """
        fields = check_grouping(by, every)
        return self.aggregate(Filter.parse(since, until, filters), fields, every)

    def aggregate(
        self, wanted: Filter, fields: Sequence[str], every: Every | None
    ) -> list[Summary]:
        """Do the work of `summarize`; for subclasses that can do it faster."""
        records = self.select(wanted, "oldest", None)
        return summarize_records(records, fields, every, self.bounds)

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
        return [_usage_item(record) for record in islice(records, first, None)]

    def prune(self, before: datetime) -> int:
        """Delete the records with ``started_at < before`` and return how many these were.

        Raises:
            StorageUnavailable: The storage cannot be reached now.
        """
        raise NotImplementedError(f"{type(self).__name__} does not offer prune()")


def _clean_name(name: str) -> str:
    return "".join(character if character.isprintable() else "_" for character in name[:64])


def _usage_item(record: UsageRecord) -> dict[str, Any]:
    return {
        "url": record.url,
        "user_agent": {
            "browser": record.browser,
            "language": record.language,
            "platform": record.platform,
            "version": record.browser_version,
        },
        "blueprint": record.blueprint,
        "view_args": record.view_args or None,
        "status": record.status,
        "remote_addr": record.remote_addr,
        "xforwardedfor": record.forwarded_for,
        "authorization": record.authorization,
        "ip_info": record.ip_info,
        "path": record.path,
        "speed": record.duration_seconds,
        "date": record.started_at.replace(tzinfo=None),
        "username": record.username,
        "track_var": record.track_var or None,
    }


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_copy(inner) for inner in value]
    return value
