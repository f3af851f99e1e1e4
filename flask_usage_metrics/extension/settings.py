"""The settings: every TRACK_USAGE_* key of an app's configuration, read and checked once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from math import inf
from typing import Any

import msgspec

from flask_usage_metrics.enrich.clients.own_kinds import OwnKinds
from flask_usage_metrics.enrich.privacy.policy import PRESETS, Preset
from flask_usage_metrics.enrich.privacy.secrets import SecretFinder
from flask_usage_metrics.enrich.trusted_proxies import TrustedProxies
from flask_usage_metrics.errors import ConfigError, UnknownName
from flask_usage_metrics.extension.label_settings import check_labels
from flask_usage_metrics.metrics.objectives import Objective, parse_objectives
from flask_usage_metrics.metrics.shape import Shape
from flask_usage_metrics.records.summary import BUCKETS
from flask_usage_metrics.runtime.shown_values import shown

PREFIX = "TRACK_USAGE_"

_LEAST_SPOOL_BYTES = 1024 * 1024
"""With less, one dropped file of a spool would be most of its records."""

_MOST_DAYS = 36_525
"""A century: enough for everybody, and never before the year 1."""

_MOST_FLUSH_SECONDS = 86_400
"""A day; a wait that the platform cannot express would end the thread that writes."""

_PATH = re.compile(r"/(?!/)[A-Za-z0-9/._~!$&'()*+,;=:@-]*")
"""A path that a URL has as it is (RFC 3986, 3.3), and in which Werkzeug reads no variable."""


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """The configuration of one app.

    Attributes:
        include_only: Track only what is included; otherwise all but what is excluded.
        storage: A URL, a storage, a callable, or a list of these; None: the default file.
        metrics_path: Path of the Prometheus exposition; None: no route.
        metrics_token: Bearer token a scrape must show; None: everybody may read.
        exclude: Endpoint globs, or path globs when they start with ``/``, besides static files;
            None: not even these.
        country: See `enrich.country`.
        trusted_proxies: Who may say whom they speak for.
        clients: What the owner calls clients.
        use_freegeoip: Whether an HTTP service is asked for the country, as flask-track-usage did.
        freegeoip_endpoint: Its URL, with ``{ip}`` where the address goes.
        cookie: Whether people get a cookie that tells them apart.
        daily_visitors: Whether visitors are told apart, for a day, without one.
        privacy: See `enrich.privacy.policy`.
        redact: Parts of names whose values are secret, besides the usual ones.
        respect_gpc: Whether visitors may ask not to be known.
        traces: Whether requests have spans, or the SpanExporter these go to.
        traces_enduser: Whether spans name the user.
        shape: Labels, buckets, bound and objectives of the Prometheus families.
        buffer_records: How many records may wait in front of each storage.
        flush_seconds: Seconds a record waits for others to be written with.
        inline: Whether a request waits until its record is written.
        state_dir: Where the app's processes keep what they share; None: see
            `state_dir.default_place`.
        spool_bytes: What may wait on disk for each storage that is down.
        retention_days: How many days records are kept; None: for ever.
    """

    include_only: bool
    storage: Any
    metrics_path: str | None
    metrics_token: str | None
    exclude: tuple[str, ...] | None
    country: Any
    trusted_proxies: TrustedProxies
    clients: OwnKinds
    use_freegeoip: bool
    freegeoip_endpoint: str | None
    cookie: bool
    daily_visitors: bool
    privacy: Preset
    redact: tuple[str, ...]
    respect_gpc: bool
    traces: Any
    traces_enduser: bool
    shape: Shape
    buffer_records: int
    flush_seconds: float
    inline: bool
    state_dir: str | None
    spool_bytes: int
    retention_days: float | None


class Key(msgspec.Struct, frozen=True):
    """One key of the configuration.

    Attributes:
        default: What holds when the key is absent; given to `parse` like any other value.
        expected: What a value must be, for the error message.
        parse: Returns the plain value; raises ConfigError with a message of its own, or anything
            else if the value is not what is expected.
        is_secret: Whether messages tell only the type of a wrong value: it could be a token, or
            a URL with a password.
        error: Raised for a wrong value.
    """

    default: Any
    expected: str
    parse: Callable[[Any], Any]
    is_secret: bool = False
    error: type[ConfigError] = ConfigError


def read(config: Mapping[str, Any]) -> Settings:
    """Read and check an app's configuration.

    Raises:
        ConfigError: A key is not known, or a value is wrong.
    """
    for given in config:
        if given.startswith(PREFIX) and given not in KEYS:
            nearest = get_close_matches(given, KEYS, 1, cutoff=0)[0]
            raise ConfigError(f"unknown setting {given}: did you mean {nearest}?")
    values = {name.removeprefix(PREFIX).lower(): _read(config, name) for name in KEYS}
    labels = check_labels(
        values.pop("labels"), values.pop("histogram_labels"), values.pop("label_names")
    )
    shape = Shape(
        max_series=values.pop("max_series"),
        buckets=values.pop("buckets"),
        objectives=values.pop("slo"),
        **labels._asdict(),
    )
    return Settings(
        include_only=values.pop("include_or_exclude_views") == "include",
        inline=values.pop("delivery") == "inline",
        daily_visitors=values.pop("visitors") == "daily",
        shape=shape,
        **values,
    )


def _read(config: Mapping[str, Any], name: str) -> Any:
    key = KEYS[name]
    given = config.get(name, key.default)
    try:
        return key.parse(given)
    except ConfigError:
        raise
    except Exception:  # noqa: BLE001 - whatever a value of another type makes it raise
        # Without its cause, whose text would hold what was given.
        what = type(given).__name__ if key.is_secret else shown(given)
        raise key.error(f"{name} must be {key.expected}, not {what}") from None


# ------------------------------------------------------------------------ kinds of values


def _choice(*choices: str) -> Callable[[Any], str]:
    return lambda given: choices[choices.index(given.strip().lower())]


def _optional_choice(*choices: str) -> Callable[[Any], str | None]:
    choose = _choice(*choices)
    return lambda given: None if _is_none(given) else choose(given)


def _flag(given: Any) -> bool:
    if isinstance(given, bool):
        return given
    words = {"true": True, "yes": True, "on": True, "1": True}
    words |= {"false": False, "no": False, "off": False, "0": False}
    return words[str(given).strip().lower()]


def _is_none(given: Any) -> bool:
    return given is None or (isinstance(given, str) and given.strip().lower() in ("", "none"))


def _text(given: Any) -> str | None:
    if _is_none(given):
        return None
    if not isinstance(given, str):
        raise TypeError
    return given


def _token(given: Any) -> str | None:
    if given is None:
        return None
    # Blanks around it are of the file it was read from. Neither empty nor "None" is a token: who
    # sets one wants the page closed.
    token: str = given.strip()
    for is_wrong, what in (
        (not token, "an empty text"),
        (_is_none(token), "the text None"),
        (not token.isprintable(), "a text of several lines or with control characters"),
    ):
        if is_wrong:
            raise ConfigError(f"TRACK_USAGE_METRICS_TOKEN must be a token or None, not {what}")
    return token


def _path(given: Any) -> str | None:
    path = _text(given)
    if path is not None and not _PATH.fullmatch(path):
        raise ValueError
    return path


def _folder(given: Any) -> str | None:
    if _is_none(given):
        return None
    folder = os.fspath(given)
    if not isinstance(folder, str) or "\0" in folder:
        raise ValueError
    return folder


def _url(given: Any) -> str | None:
    url = _text(given)
    if url is not None and not url.startswith(("http://", "https://")):
        raise ValueError
    return url


def _anything(given: Any) -> Any:
    if not isinstance(given, str):
        return given
    return _items(given) if given.lstrip().startswith("[") else _text(given)


def _items(given: Any) -> tuple[Any, ...]:
    """Return a list's items; text is JSON or separated by commas."""
    if isinstance(given, str):
        if given.lstrip().startswith("["):
            given = json.loads(given)
        else:
            given = [part.strip() for part in given.split(",") if part.strip()]
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise TypeError
    # The order of a set of texts differs from one process to the next.
    return tuple(sorted(given) if isinstance(given, Set) else given)


def _texts(given: Any) -> tuple[str, ...]:
    items = () if _is_none(given) else _items(given)
    if not all(isinstance(item, str) for item in items):
        raise TypeError
    return items


def _exclude(given: Any) -> tuple[str, ...] | None:
    # From the environment "" is an empty list.
    return None if given != "" and _is_none(given) else _texts(given)


def _name_parts(given: Any) -> tuple[str, ...]:
    parts = _texts(given)
    SecretFinder(parts)  # it refuses what would be part of every name
    return parts


def _traces(given: Any) -> Any:
    if hasattr(given, "export") and hasattr(given, "shutdown"):
        return given
    return _flag(given)


def _positive_int(given: Any) -> int:
    if isinstance(given, bool | float):
        raise TypeError
    value = int(given)
    if value < 1:
        raise ValueError
    return value


def _spool_bytes(given: Any) -> int:
    value = _positive_int(given)
    if value < _LEAST_SPOOL_BYTES:
        raise ValueError
    return value


def _positive_number(given: Any) -> float:
    if isinstance(given, bool):
        raise TypeError
    value = float(given)
    if not 0 < value < inf:
        raise ValueError
    return value


def _flush_seconds(given: Any) -> float:
    seconds = _positive_number(given)
    if seconds > _MOST_FLUSH_SECONDS:
        raise ValueError
    return seconds


def _days(given: Any) -> float | None:
    if _is_none(given):
        return None
    days = _positive_number(given)
    if days > _MOST_DAYS:
        raise ValueError
    return days


def _buckets(given: Any) -> tuple[float, ...]:
    bounds = tuple(_positive_number(bound) for bound in _items(given))
    if not bounds or list(bounds) != sorted(set(bounds)):
        raise ValueError
    return bounds


def _optional_texts(given: Any) -> tuple[str, ...] | None:
    return None if given is None else _texts(given)


def _mapping(given: Any) -> dict[Any, Any]:
    return dict(json.loads(given) if isinstance(given, str) else given)


def _objectives(given: Any) -> tuple[Objective, ...]:
    if _is_none(given):
        return ()
    return parse_objectives(json.loads(given) if isinstance(given, str) else given)


def _trusted_proxies(given: Any) -> TrustedProxies:
    proxies: Sequence[str] = _texts(given)
    return TrustedProxies(proxies)


def _clients(given: Any) -> OwnKinds:
    kinds = {} if _is_none(given) else json.loads(given) if isinstance(given, str) else given
    if not isinstance(kinds, Mapping):
        raise TypeError
    return OwnKinds(kinds)


# ------------------------------------------------------------------------ the keys


KEYS: dict[str, Key] = {
    "TRACK_USAGE_INCLUDE_OR_EXCLUDE_VIEWS": Key(
        "exclude", "'include' or 'exclude'", _choice("include", "exclude"), error=UnknownName
    ),
    "TRACK_USAGE_STORAGE": Key(
        None, "a URL, a storage, a callable or a list of these", _anything, is_secret=True
    ),
    "TRACK_USAGE_METRICS_PATH": Key(
        "/metrics", "a path that starts with / and needs no percent-encoding or None", _path
    ),
    "TRACK_USAGE_METRICS_TOKEN": Key(None, "a token or None", _token, is_secret=True),
    "TRACK_USAGE_EXCLUDE": Key(
        (), "a list of endpoint globs and of paths that start with /, or None", _exclude
    ),
    "TRACK_USAGE_COUNTRY": Key(
        "auto",
        "'auto', a source such as 'mmdb:/file', a list of these or None",
        _anything,
        is_secret=True,
    ),
    "TRACK_USAGE_TRUSTED_PROXIES": Key(
        (), "a list of addresses, CIDR ranges and 'unix:'", _trusted_proxies
    ),
    "TRACK_USAGE_CLIENTS": Key({}, "a dict of regular expressions and kinds of client", _clients),
    "TRACK_USAGE_USE_FREEGEOIP": Key(False, "True or False", _flag),
    "TRACK_USAGE_FREEGEOIP_ENDPOINT": Key(
        None, "a URL that starts with http or None", _url, is_secret=True
    ),
    "TRACK_USAGE_COOKIE": Key(False, "True or False", _flag),
    "TRACK_USAGE_VISITORS": Key(None, "'daily' or None", _optional_choice("daily")),
    "TRACK_USAGE_PRIVACY": Key("full", "'full', 'balanced' or 'strict'", _choice(*PRESETS)),
    "TRACK_USAGE_REDACT": Key((), "a list of parts of names", _name_parts),
    "TRACK_USAGE_RESPECT_GPC": Key(False, "True or False", _flag),
    "TRACK_USAGE_TRACES": Key(False, "True, False or a SpanExporter", _traces),
    "TRACK_USAGE_TRACES_ENDUSER": Key(False, "True or False", _flag),
    "TRACK_USAGE_MAX_SERIES": Key(10_000, "a positive int", _positive_int),
    "TRACK_USAGE_LABELS": Key((), "a list of keys of g.track_var", _texts),
    "TRACK_USAGE_HISTOGRAM_LABELS": Key(
        None, "a list of some of the counter's labels or None", _optional_texts
    ),
    "TRACK_USAGE_BUCKETS": Key(
        BUCKETS, "a list of ascending positive numbers of seconds", _buckets
    ),
    "TRACK_USAGE_LABEL_NAMES": Key({}, "a dict of new names for some labels", _mapping),
    "TRACK_USAGE_SLO": Key(
        None,
        "a dict of ratios between 0 and 1, of pairs of such a ratio and seconds, or of dicts of "
        "ratio, seconds, endpoints and exclude, or None",
        _objectives,
    ),
    "TRACK_USAGE_BUFFER_RECORDS": Key(10_000, "a positive int", _positive_int),
    "TRACK_USAGE_FLUSH_SECONDS": Key(
        0.5, f"a positive number of seconds up to {_MOST_FLUSH_SECONDS}", _flush_seconds
    ),
    "TRACK_USAGE_STATE_DIR": Key(None, "a path or None", _folder),
    "TRACK_USAGE_SPOOL_BYTES": Key(
        256 * 1024 * 1024, f"an int of at least {_LEAST_SPOOL_BYTES}", _spool_bytes
    ),
    "TRACK_USAGE_RETENTION_DAYS": Key(
        None, f"a positive number of days up to {_MOST_DAYS} or None", _days
    ),
    "TRACK_USAGE_DELIVERY": Key(
        "background", "'background' or 'inline'", _choice("background", "inline")
    ),
}
"""All keys, in the order of the README's table."""
