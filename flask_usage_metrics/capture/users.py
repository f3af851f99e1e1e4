"""Who makes a request: the user and the API client, as the app knows them in its context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Request, g

from flask_usage_metrics.enrich.privacy.redaction import REDACTED, Redactor
from flask_usage_metrics.runtime.faults import Faults

MAX_NAME = 256
"""Characters kept of a name."""

Ask = Callable[[], object]

_LOGIN_USER = "_login_user"
"""Where Flask-Login (0.6 and later) keeps the user it has loaded, on ``g``."""


class Users:
    """Learns names of one app's requests; never raises.

    Args:
        app: The app.
        username: Called without arguments in the request's context; what it returns, if not None,
            is the user's name.
        consumer: Called likewise; names the API client: the owner of a key, a tenant.
        faults: Where it is reported that one of them raised.
    """

    def __init__(
        self, app: Flask, *, username: Ask | None, consumer: Ask | None, faults: Faults
    ) -> None:
        self._app = app
        self._username = username
        self._consumer = consumer
        self._faults = faults
        self._redactor = Redactor()

    @property
    def are_known(self) -> bool:
        """Whether there is anything to ask; the app may have been given Flask-Login lately."""
        return (
            self._username is not None
            or self._consumer is not None
            or "login_manager" in self._app.__dict__
        )

    def ask(self) -> tuple[str | None, str | None]:
        """Return user name and consumer, in the request's context."""
        username = self._ask("username", self._username)
        if username is None and "login_manager" in self._app.__dict__:
            username = self._ask("username", _logged_in)
        return username, self._ask("consumer", self._consumer)

    def authorized(self, learned: Request) -> tuple[bool, str | None]:
        """Return whether a client authorised itself, and the name it gave in Basic authentication.

        A name that looks like a token is one: some services take the API key for a user name.
        """
        try:
            parsed = learned.authorization
        except ValueError:  # Werkzeug 3.1 lets one that is not ASCII pass
            return False, None
        if parsed is None or parsed.type != "basic" or not parsed.username:
            return parsed is not None, None
        name = parsed.username[:MAX_NAME]
        return True, REDACTED if self._redactor.is_secret_text(name) else name

    def _ask(self, what: str, ask: Ask | None) -> str | None:
        if ask is None:
            return None
        try:
            name = ask()
            return None if name is None else str(name)[:MAX_NAME]
        except Exception as error:  # noqa: BLE001 - it is the app's, and must not end a request
            self._faults.report(what, error, f"a request's {what} is not known")
            return None


def _logged_in() -> Any:
    """Return the id of the user Flask-Login has loaded; it is never made to load one.

    The id, because the text of a user object is whatever its class makes of it.
    """
    user = g.get(_LOGIN_USER)
    return user.get_id() if user is not None and user.is_authenticated else None
