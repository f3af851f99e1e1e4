"""Names the user and the API client of a request, as the app knows them in its context."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from flask import Flask, Request, g

from flask_usage_metrics.enrich.privacy.secrets import REDACTED, SecretFinder
from flask_usage_metrics.runtime.faults import Faults

MAX_NAME = 256
"""Characters kept of a name."""

Ask = Callable[[], object]

_LOGIN_USER = "_login_user"
"""Attribute of ``g`` in which Flask-Login (0.6 and later) keeps the user it has loaded."""


class Users:
    """Asks the app for the names behind its requests; never raises an `Exception`.

    Args:
        app: The app.
        username: Called without arguments in the request's context; returns the user's name, or
            None if not known. None: Flask-Login is asked, if the app has it.
        consumer: Called likewise; returns the name of the API client, such as the owner of a key
            or a tenant. None: not asked for.
        faults: Where it is reported that one of them raised.
    """

    def __init__(
        self, app: Flask, *, username: Ask | None, consumer: Ask | None, faults: Faults
    ) -> None:
        self._app = app
        self._username = username
        self._consumer = consumer
        self._faults = faults
        self._secrets = SecretFinder()

    @property
    def are_known(self) -> bool:
        """Whether there is a function or Flask-Login to ask; an app may get Flask-Login later."""
        return (
            self._username is not None
            or self._consumer is not None
            or "login_manager" in self._app.__dict__
        )

    def ask(self) -> tuple[str | None, str | None]:
        """Return user name and API client, each at most 256 characters or None.

        Call it in the request's context.
        """
        username = self._ask("username", self._username)
        if username is None and "login_manager" in self._app.__dict__:
            username = self._ask("username", _logged_in)
        return username, self._ask("consumer", self._consumer)

    def authorized(self, request: Request) -> tuple[bool, str | None]:
        """Return whether a client authorised itself, and its name in Basic authentication or None.

        A name without a password, or one that looks like a token, is replaced by `REDACTED`: some
        services take the API key as the user name.

        Args:
            request: Its Authorization header is parsed.
        """
        try:
            parsed = request.authorization
        except ValueError:  # Werkzeug 3.1 raises it for a name that is not ASCII
            return False, None
        if parsed is None or parsed.type != "basic" or not parsed.username:
            return parsed is not None, None
        name = parsed.username[:MAX_NAME]
        is_key = not parsed.password or self._secrets.is_secret_text(name)
        return True, REDACTED if is_key else name

    def _ask(self, name_of: str, ask: Ask | None) -> str | None:
        if ask is None:
            return None
        try:
            name = ask()
            return None if name is None else str(name)[:MAX_NAME]
        except Exception as error:  # noqa: BLE001 - code of the app, which must not end a request
            self._faults.report(name_of, error, f"a request's {name_of} is not known")
            return None


def _logged_in() -> Any:
    """Return the id of the user that Flask-Login has loaded; None if it has loaded none.

    Never makes it load one. Not the user's text, which is whatever its class makes of it.
    """
    user = g.get(_LOGIN_USER)
    return user.get_id() if user is not None and user.is_authenticated else None
