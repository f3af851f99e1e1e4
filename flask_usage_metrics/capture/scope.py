"""Decides which requests are tracked: by view, endpoint, glob, path or blueprint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any
from weakref import WeakSet, ref

from flask import Blueprint, Flask

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.runtime.texts import from_wsgi

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment


class Marks:
    """Views, endpoints, paths and blueprints that were included, or that were excluded.

    One `TrackUsage` has two of them, for all its apps; marks are added at any time. Views and
    blueprints are referred to weakly, as an app factory may mark new ones for each app.

    Args:
        patterns: Endpoints or paths, or globs of these, that are marked from the start.

    Attributes:
        scopes: Told of each new mark, so that they decide again.
    """

    def __init__(self, patterns: Sequence[str] = ()) -> None:
        self.scopes: WeakSet[Scope] = WeakSet()
        self._views: list[Callable[[], object]] = []
        self._endpoints: list[str] = []
        self._paths: list[str] = []
        self._blueprints: list[Callable[[], object]] = []
        self._blueprint_names: list[str] = []
        self._unmatched = False
        for pattern in patterns:
            self.add(pattern)

    def add(self, target: object) -> None:
        """Mark a view, an endpoint or glob, a path or glob (starting with /), or None.

        None marks the requests that no route matched.

        Raises:
            ConfigError: The target is of another type.
        """
        if target is None:
            self._unmatched = True
        elif isinstance(target, str):
            _note(target, self._paths if target.startswith("/") else self._endpoints)
        elif callable(target):
            _refer(target, self._views)
        else:
            raise ConfigError(
                f"expected a view, an endpoint, a glob or a path, not {type(target).__name__}"
            )
        for scope in self.scopes:
            scope.forget()

    def add_blueprint(self, blueprint: object) -> None:
        """Mark a blueprint, given itself or by its full name, and all blueprints nested in it.

        Raises:
            ConfigError: It is neither a blueprint nor a name.
        """
        if not isinstance(blueprint, str | Blueprint):
            raise ConfigError(f"expected a blueprint or its name, not {type(blueprint).__name__}")
        if isinstance(blueprint, str):
            _note(blueprint, self._blueprint_names)
        else:
            _refer(blueprint, self._blueprints)
        for scope in self.scopes:
            scope.forget()

    @property
    def by_path(self) -> bool:
        """Whether a path is among the marks."""
        return bool(self._paths)

    def match_path(self, path: str) -> bool:
        """Tell whether a path is marked."""
        return any(fnmatchcase(path, pattern) for pattern in self._paths)

    def match_endpoint(self, app: Flask, endpoint: str | None) -> bool:
        """Tell whether an endpoint is marked: itself, its view or a blueprint around it."""
        if endpoint is None:
            return self._unmatched
        if any(fnmatchcase(endpoint, pattern) for pattern in self._endpoints):
            return True
        layers = _layers(app.view_functions.get(endpoint))
        marked = [find() for find in self._views]
        if any(view is layer for view in marked for layer in layers):
            return True
        return any(self._match_blueprint(app, name) for name in _blueprint_names(endpoint))

    def names_static(self, app: Flask, endpoint: str, path: str) -> bool:
        """Tell whether static files are marked as such, not by a blueprint or by ``"*"``."""
        names = (pattern for pattern in self._endpoints if pattern.endswith("static"))
        view = app.view_functions.get(endpoint)
        return (
            any(fnmatchcase(endpoint, name) for name in names)
            or any(find() is view for find in self._views)
            or self.match_path(path)
        )

    def _match_blueprint(self, app: Flask, name: str) -> bool:
        registered = app.blueprints.get(name)
        return name in self._blueprint_names or (
            registered is not None and any(find() is registered for find in self._blueprints)
        )


def _note(name: str, names: list[str]) -> None:
    if name not in names:
        names.append(name)


def _refer(target: object, references: list[Callable[[], object]]) -> None:
    """Add a reference to an object, unless there is one; a weak one where its class allows it."""
    if any(find() is target for find in references):
        return
    try:
        references.append(ref(target, references.remove))
    except TypeError:
        references.append(lambda: target)


class Scope:
    """Decides, for one app, which requests are tracked; each endpoint is decided once.

    Args:
        app: The app the endpoints belong to.
        include_only: Track only included requests; otherwise all but excluded ones.
        included: Marks of included requests.
        excluded: Marks of excluded requests; they win over `included`.
        never: Patterns that are excluded by configuration; they win over `included` too.
        static: Whether static files are tracked as anything else is; if not, only where `included`
            names them.
        own: The endpoint of this package, never tracked.
        own_path: Its path, where a request that no route matched is not tracked either: a rule of
            the app about hosts may refuse it before it is routed. None: it has none.

    Attributes:
        tracked: Endpoints decided to be tracked whatever the path, so that a caller may skip
            `tracks`; None among them stands for requests that no route matched.
    """

    def __init__(
        self,
        app: Flask,
        *,
        include_only: bool,
        included: Marks,
        excluded: Marks,
        never: Sequence[str],
        static: bool,
        own: str,
        own_path: str | None,
    ) -> None:
        self._app = app
        self._include_only = include_only
        self._included = included
        self._excluded = excluded
        self._never = Marks(never)
        self._static = static
        self._own = own
        self._own_path = own_path
        self._decided: dict[str | None, bool] = {}
        self.tracked: set[str | None] = set()
        for marks in (included, excluded):
            marks.scopes.add(self)

    def tracks(self, endpoint: str | None, environ: WSGIEnvironment) -> bool:
        """Tell whether a request is tracked; for any thread.

        Args:
            endpoint: Flask's endpoint; None when no route matched.
            environ: Of the request; its path below the app's root is compared with marked paths.
        """
        if endpoint is None and environ.get("PATH_INFO") == self._own_path:
            return False
        tracked = self._decided.get(endpoint)
        if tracked is None:
            tracked = self._decide(endpoint, _path(environ))
            if not any(marks.by_path for marks in (self._included, self._excluded, self._never)):
                self._decided[endpoint] = tracked
                if tracked and not (endpoint is None and self._own_path is not None):
                    self.tracked.add(endpoint)
        return tracked

    def forget(self) -> None:
        """Forget all decisions, as a mark was added."""
        self._decided = {}
        self.tracked = set()

    def _decide(self, endpoint: str | None, path: str) -> bool:
        if endpoint == self._own or any(
            marks.match_endpoint(self._app, endpoint) or marks.match_path(path)
            for marks in (self._never, self._excluded)
        ):
            return False
        if (
            endpoint is not None
            and not self._static
            and (endpoint == "static" or endpoint.endswith(".static"))
            and not self._included.names_static(self._app, endpoint, path)
        ):
            return False
        if not self._include_only:
            return True
        return endpoint is not None and (
            self._included.match_endpoint(self._app, endpoint) or self._included.match_path(path)
        )


def _layers(view: Callable[..., Any] | None) -> list[object]:
    """Return the view, the functions it wraps, and the classes of class-based views among them."""
    layers: list[object] = []
    while view is not None and not any(view is layer for layer in layers):
        layers.append(view)
        view_class = getattr(view, "view_class", None)
        if view_class is not None:
            layers.append(view_class)
        view = getattr(view, "__wrapped__", None)
    return layers


def _blueprint_names(endpoint: str) -> list[str]:
    """Return the full names of the blueprints around an endpoint: a.b.view -> [a, a.b]."""
    parts = endpoint.split(".")[:-1]
    return [".".join(parts[: end + 1]) for end in range(len(parts))]


def _path(environ: WSGIEnvironment) -> str:
    path: str = environ.get("PATH_INFO", "")
    if path.isascii():
        return path
    return from_wsgi(path)
