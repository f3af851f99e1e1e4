"""Name, attributes and status of a record's span, by OpenTelemetry's conventions for HTTP servers.

Semantic conventions 1.44, docs/http/http-spans.md and the attribute registry. The names are
literals, as every other package of OpenTelemetry pins the package of constants to one version.
"""

from __future__ import annotations

from functools import lru_cache

from flask_usage_metrics.records.methods import METHODS, OTHER_METHOD
from flask_usage_metrics.records.record import UsageRecord

SCHEMA_URL = "https://opentelemetry.io/schemas/1.44.0"

Attributes = dict[str, str | int | bool]

_PORTS = {"http": 80, "https": 443}
_PEOPLE = ("human", "prefetch")


def name_of(record: UsageRecord) -> str:
    """Return the span's name: method and route, or the method alone if no route matched.

    Never a path, of which there is no end. Other methods than those of HTTP are ``HTTP``.
    """
    method = record.method if record.method in METHODS else "HTTP"
    return method if record.rule is None else f"{method} {route_of(record)}"


def route_of(record: UsageRecord) -> str:
    """Return the rule of a record that has one, after the prefix the app is mounted under."""
    return f"{record.root_path}{record.rule}" if record.root_path else record.rule or ""


def is_error(record: UsageRecord) -> bool:
    """Tell whether the server failed: with a 5xx or an exception. A 4xx is no error of the span."""
    return record.exception is not None or record.is_server_error


def attributes_of(record: UsageRecord, *, user: bool) -> Attributes:
    """Return the attributes of a request's span.

    Args:
        record: After privacy, so that the span holds no more than the row.
        user: Whether to name the user (``enduser.id``).
    """
    method = record.method
    found: Attributes = {
        "http.request.method": method if method in METHODS else OTHER_METHOD,
        "url.scheme": record.scheme,
        "url.path": record.root_path + record.path,
        "http.response.status_code": record.status,
        "network.protocol.version": record.protocol.rpartition("/")[2],
        "flask_usage.client": record.client,
        "flask_usage.record_id": record.id,
    }
    if method not in METHODS:
        found["http.request.method_original"] = method
    host, port = _split(record.host)
    found["server.address"] = host
    port = port or _PORTS.get(record.scheme)
    if port is not None:
        found["server.port"] = port
    if record.query:
        found["url.query"] = record.query
    if record.rule is not None:
        found["http.route"] = route_of(record)
    if record.endpoint is not None:
        found["flask.endpoint"] = record.endpoint
    if record.blueprint is not None:
        found["flask.blueprint"] = record.blueprint
    if record.remote_addr is not None:
        found["client.address"] = record.remote_addr
    if record.country is not None:
        found["geo.country.iso_code"] = record.country
    if record.user_agent is not None:
        found["user_agent.original"] = record.user_agent
    if record.client not in _PEOPLE:
        found["user_agent.synthetic.type"] = "bot"
    if user and record.username is not None:
        found["enduser.id"] = record.username
    if is_error(record):
        found["error.type"] = record.exception or str(record.status)
    return found


def hints_of(
    endpoint: str | None, blueprint: str | None, client: str, country: str | None
) -> Attributes:
    """Return the attributes that we add to a span of another instrumentation.

    Args:
        endpoint: Flask's endpoint; None when no route matched.
        blueprint: Its name; None: none.
        client: Kind of client.
        country: ISO 3166-1 alpha-2 code; None: not known.
    """
    found: Attributes = {"flask_usage.client": client}
    if endpoint is not None:
        found["flask.endpoint"] = endpoint
    if blueprint is not None:
        found["flask.blueprint"] = blueprint
    if country is not None:
        found["geo.country.iso_code"] = country
    if client not in _PEOPLE:
        found["user_agent.synthetic.type"] = "bot"
    return found


@lru_cache(1024)
def _split(host: str) -> tuple[str, int | None]:
    """Split a Host header into name and port; the port is None if it has none or is no number."""
    name, colon, port = host.rpartition(":")
    if colon and port.isdecimal() and port.isascii() and len(port) <= 5 and "]" not in port:
        return name, int(port)
    return host, None
