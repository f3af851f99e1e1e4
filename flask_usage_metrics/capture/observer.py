"""The parts of one app that its exchanges share: which requests count, and who takes the result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

from flask import Flask, Request

from flask_usage_metrics.capture import http_errors
from flask_usage_metrics.capture.context import ContextReader
from flask_usage_metrics.capture.scope import Scope
from flask_usage_metrics.records.observation import Observation
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.forks import FORKS

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Live(Protocol):
    """An exchange that has not ended."""

    def is_tracked(self) -> bool:
        """Tell whether its request counts, as far as is known by now."""


class LiveExchanges(set[Live]):
    """The exchanges of one app that have not ended, of requests that are tracked or not."""

    def __init__(self) -> None:
        super().__init__()
        FORKS.register(self)

    def in_progress(self) -> int:
        """Return the number of tracked requests that have not been answered yet."""
        return sum(exchange.is_tracked() for exchange in self.copy())

    def reset_after_fork(self) -> None:
        """Forget the requests that the parent process is answering."""
        self.clear()


class Observer:
    """Shared by all exchanges of one app; for any thread.

    Args:
        app: The app that answers the requests.
        scope: Decides which requests are tracked.
        submit: Takes the observation of a tracked request; called in the request's thread when
            the last byte was handed to the server.
        lose: Called instead of `submit` where making the observation failed: counts the loss.
        context_reader: Finds the facts that only some apps ask for.
        headers: WSGI names of further request headers that observations keep.
        faults: Takes failures of our own.
        live: Exchanges that have not ended.
    """

    __slots__ = (
        "_app",
        "context_reader",
        "faults",
        "headers",
        "live",
        "lose",
        "scope",
        "submit",
    )

    def __init__(
        self,
        app: Flask,
        *,
        scope: Scope,
        submit: Callable[[Observation], None],
        lose: Callable[[], None],
        context_reader: ContextReader,
        headers: tuple[str, ...],
        faults: Faults,
        live: LiveExchanges,
    ) -> None:
        self._app = app
        self.scope = scope
        self.submit = submit
        self.lose = lose
        self.context_reader = context_reader
        self.headers = headers
        self.faults = faults
        self.live = live

    def status_of(self, error: BaseException) -> int:
        """Return the status that is answered to an exception that leaves the app.

        The server answers 500. An app that both traps and propagates its HTTP exceptions has
        somebody around it who answers them, as Connexion does.
        """
        config = self._app.config
        if config.get("TRAP_HTTP_EXCEPTIONS") and config.get("PROPAGATE_EXCEPTIONS"):
            return http_errors.status_of(error) or 500
        return 500

    def match(self, environ: WSGIEnvironment) -> Request | None:
        """Route a request that ended before its route was learned, as Flask would have.

        Returns:
            A request with `url_rule` and `view_args` if a route matches; None if it cannot even
            be asked, mostly for the reason that ended the request.
        """
        with suppress(Exception):
            again = self._app.request_class(environ, populate_request=False)
            adapter = self._app.create_url_adapter(again)
            if adapter is not None:
                again.url_rule, arguments = adapter.match(return_rule=True)
                again.view_args = dict(arguments)
            return again
        return None
