"""``g.track_var``: a dict of its own for each request, made when somebody asks for it."""

from __future__ import annotations

from typing import Any

from flask import Flask, has_request_context, request

TRACK_VAR = "flask_usage_metrics.capture.track_var"
"""Key of the dict in the WSGI environ of its request."""


def install(app: Flask) -> None:
    """Give the app's ``g`` the attribute ``track_var``.

    Not by a hook: an earlier hook may answer the request or already read the dict, and up to
    Flask 3.1 a nested request shares the ``g`` of the outer one.

    Args:
        app: Its class of ``g`` is replaced by a subclass.
    """
    globals_class: Any = type("Globals", (_TrackVar, app.app_ctx_globals_class), {})
    app.app_ctx_globals_class = globals_class


class _TrackVar:
    """Base class of ``g`` with the attribute; outside a request the app context holds the dict."""

    def _home(self) -> dict[str, Any]:
        return request.environ if has_request_context() else self.__dict__

    @property
    def track_var(self) -> Any:
        return self._home().setdefault(TRACK_VAR, {})

    def __setattr__(self, name: str, value: Any) -> None:
        # Flask's class writes into __dict__, past any property.
        if name == "track_var":
            self._home()[TRACK_VAR] = value
        else:
            super().__setattr__(name, value)

    def __contains__(self, name: str) -> bool:
        return name == "track_var" or super().__contains__(name)  # type: ignore[misc]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or the default."""
        return self.track_var if name == "track_var" else super().get(name, default)  # type: ignore[misc]

    def setdefault(self, name: str, default: Any = None) -> Any:
        """Return an attribute, set to the default if there was none."""
        return self.track_var if name == "track_var" else super().setdefault(name, default)  # type: ignore[misc]
