"""Answers scrapes that show the token at the WSGI boundary, before any rule of the app's own.

A guard for logins, a limit, a redirect to https or a rule about hosts is meant for visitors, and
would keep Prometheus out. Who shows the token may read in any case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from flask_usage_metrics.capture.middleware import Middleware, uncounted

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment


class Scrapes:
    """Stands in front of an app's middleware.

    Args:
        middleware: Answers all else.
        path: Where scrapes go.
        may_read: Takes an environ; tells whether it shows the token.
        metrics_app: Answers them.
    """

    def __init__(
        self,
        middleware: Middleware,
        *,
        path: str,
        may_read: Callable[[WSGIEnvironment], bool],
        metrics_app: WSGIApplication,
    ) -> None:
        self._middleware = middleware
        self._path = path
        self._may_read = may_read
        self._answer = uncounted(metrics_app)
        self._wsgi_app = middleware.wsgi_app

    def wsgi_app(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        """Answer a request (PEP 3333)."""
        if environ.get("PATH_INFO") == self._path and self._may_read(environ):
            self._middleware.get_ready(environ)
            return self._answer(environ, start_response)
        return self._wsgi_app(environ, start_response)
