"""Tells which connections were taken over by the app, as WebSockets are: they have no response.

The app speaks past WSGI with whoever is at the other end, for as long as they like. Servers and
libraries have no common word for it; these are their signs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask import Request

from flask_usage_metrics.records.record import TAKEN_OVER

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

STATUS = str(TAKEN_OVER)
"""What the other end was answered: Switching Protocols."""


def has_raised(error: BaseException, environ: WSGIEnvironment) -> bool:
    """Tell whether what an app raised, before it sent a status, says that it took the connection.

    Args:
        error: gunicorn is told by StopIteration, Werkzeug's server by ConnectionError.
        environ: Of the request.
    """
    if isinstance(error, StopIteration):
        return "gunicorn.socket" in environ or _asks(environ)
    # No subclass: these are of connections of the app's own.
    return type(error) is ConnectionError and _asks(environ)


def has_answered(environ: WSGIEnvironment, status: str, routed: Request | None) -> bool:
    """Tell whether the end of a response says that the app took the connection.

    Args:
        environ: Of the request.
        status: Status line; ``""`` if none was sent.
        routed: The request in Flask; None if it is not known.
    """
    if not _asks(environ):
        return False
    if not status:
        return True  # gevent, eventlet, and Engine.IO on any server: nothing is left to be sent
    # To a handshake no 2xx is an answer (RFC 6455, 4.1): it is what a view returns in the end.
    rule = None if routed is None else routed.url_rule
    return status.startswith("2") and rule is not None and bool(rule.websocket)


def _asks(environ: WSGIEnvironment) -> bool:
    return str(environ.get("HTTP_UPGRADE", "")).lower() == "websocket"
