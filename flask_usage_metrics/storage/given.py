"""A dict of flask-track-usage's shape -> `UsageRecord`: what ``storage(data)`` is called with."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints
from urllib.parse import unquote, urlencode, urlsplit

import msgspec

from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.records.ids import NUMBER_BITS, record_ids
from flask_usage_metrics.records.query import as_utc
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.runtime.json_values import encode_json
from flask_usage_metrics.runtime.texts import encodable, without_nul

_decode = msgspec.json.Decoder().decode


def as_record(data: Mapping[str, Any]) -> UsageRecord:
    """Return a dict as a record.

    Where a key of flask-track-usage and a field of ours say different things, the former holds:
    code written for it changes no others. What is not given is unknown, else empty or 0.

    Args:
        data: As `compat.as_dict` makes it, as flask-track-usage did, an item of `get_usage`, or
            some keys of these; others are ignored. Without an ``id`` it is a record of its own;
            without ``date`` and ``started_at`` it is of now. Naive times mean UTC.

    Raises:
        ValueError: A value is none of its kind, such as a status that is no number, or larger than
            any storage keeps; the message names it.
        TypeError: It is no dict, or the date is no date.
        OverflowError: The date is beyond what a datetime can hold.
    """
    if not isinstance(data, Mapping):
        raise TypeError(f"a record must be a dict, not {type(data).__name__}")
    given = {**_request_line(data), **data, **_renamed(data), **_agent(data)}
    fields = {name: _read(name, given.get(name)) for name in _KINDS}
    fields["started_at"] = started_at = _moment(data)
    if not fields["id"] or not isinstance(data["id"], str):  # such as the key of a row
        started_ns = int(started_at.timestamp() * 1e9)
        [fields["id"]] = record_ids([started_ns], [secrets.randbits(NUMBER_BITS)])
    address = fields["remote_addr"]
    fields["remote_addr"] = None if address is None else normalise(address) or address
    fields["duration_seconds"] = max(fields["duration_seconds"], 0.0)
    record = UsageRecord(**fields)
    url = data.get("url")
    if url is None:
        if not record.query and isinstance(data.get("url_args"), Mapping):
            return msgspec.structs.replace(record, query=urlencode(data["url_args"]))
        return record
    # Compared first: taken apart, a path in which "?" is decoded would end there.
    if record.url == url:
        return record
    return msgspec.structs.replace(record, **_parts(_text(url), record))


# -- flask-track-usage's keys -------------------------------------------------------------------

_NAMES = {
    "xforwardedfor": "forwarded_for",
    "speed": "duration_seconds",
    "content_length": "bytes_sent",
    "server_name": "app",
}


def _renamed(data: Mapping[str, Any]) -> dict[str, Any]:
    return {field: data[name] for name, field in _NAMES.items() if name in data}


def _agent(data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that a user agent tells: an object, an item's dict, or the header."""
    agent = data.get("user_agent")
    if agent is None or isinstance(agent, str):
        return {}
    known: Callable[[str], Any] = (
        agent.get if isinstance(agent, Mapping) else lambda name: getattr(agent, name, None)
    )
    header = known("string")
    if header is None and not isinstance(agent, Mapping):
        header = str(agent)
    told = {
        "browser": known("browser"),
        "browser_version": known("version"),
        "platform": known("platform"),
        "language": known("language"),
    }
    # Werkzeug's own knows nothing but the header since 2.1.
    return {"user_agent": header or None, **{field: told[field] for field in told if told[field]}}


def _request_line(data: Mapping[str, Any]) -> dict[str, str]:
    words = str(data.get("request") or "").split()
    return {"method": words[0], "protocol": words[-1]} if len(words) >= 3 else {}


def _moment(data: Mapping[str, Any]) -> datetime:
    """Return when it started: the date, to the microsecond if ``started_at`` is of that second."""
    date, exact = _time(data.get("date")), _time(data.get("started_at"))
    if date is None:
        return exact or datetime.now(timezone.utc)
    if exact is not None and exact.replace(microsecond=0) == date:
        return exact
    return date


def _time(value: Any) -> datetime | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = msgspec.convert(value, datetime)
    if isinstance(value, datetime):
        return as_utc(value)
    return datetime.fromtimestamp(value, timezone.utc)


def _parts(url: str, record: UsageRecord) -> dict[str, str]:
    """Take a URL apart, as far as it is one; its path stays that of the record if that has one."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return {"scheme": "", "host": "", "query": url.partition("?")[2]}
    whole = _text(unquote(parts.path))
    path = record.path or whole
    root = whole.removesuffix(path) if whole.endswith(path) else record.root_path
    return {
        "scheme": parts.scheme,
        "host": parts.netloc,
        "root_path": root.rstrip("/"),
        "path": path,
        "query": parts.query,
    }


# -- values of the fields -----------------------------------------------------------------------


def _text(value: Any) -> str:
    return encodable(str(value)).replace("\0", "")


def _integer(value: Any) -> int:
    return int(value.partition(" ")[0]) if isinstance(value, str) else int(value)  # "200 OK"


def _object(value: Any) -> dict[str, Any]:
    """Return JSON values: of a dict of anything, or of a JSON text as in items of `get_usage`."""
    if isinstance(value, str):
        try:
            value = _decode(value)
        except msgspec.DecodeError:  # flask-track-usage cut it off
            value = {"value": value}
    decoded = _decode(encode_json(value))
    found = without_nul(decoded if isinstance(decoded, dict) else {"value": decoded})
    return dict(found)


_READERS: dict[Any, Callable[[Any], Any]] = {
    str: _text,
    int: _integer,
    float: float,
    bool: bool,
    dict: _object,
    datetime: _time,
}


def _kind(hint: Any) -> tuple[Any, bool]:
    """Return the type of a field, and whether None is a value of it."""
    members = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    [kind] = (member for member in members if member is not NoneType)
    return get_origin(kind) or kind, NoneType in members


_LARGEST = {"status": 2**31 - 1}
"""What a column holds, where that is less than 64 bits."""

_KINDS = {name: _kind(hint) for name, hint in get_type_hints(UsageRecord).items()}


def _read(name: str, value: Any) -> Any:
    kind, is_optional = _KINDS[name]
    if value is None or (kind is dict and value in ("", "null", "None")):
        return None if is_optional or kind is datetime else kind()
    try:
        read = _READERS[kind](value)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{name}: {error}") from error
    if kind is int and abs(read) > _LARGEST.get(name, 2**63 - 1):
        raise ValueError(f"{name}: the number is too large")
    return read
