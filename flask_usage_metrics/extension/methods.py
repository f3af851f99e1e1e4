"""The methods that an app answers: those of HTTP, and those that its rules name."""

from __future__ import annotations

import re
from collections.abc import Callable, Set
from weakref import ref

from flask import Flask

from flask_usage_metrics.records.methods import METHODS

_NAME = re.compile(r"[A-Z][A-Z0-9_-]{0,31}")


def methods_of(app: Flask) -> Callable[[], Set[str]]:
    """Return a function for the methods of an app as they are then; it does not keep the app.

    Rules may be added until the first request. Strangers cannot add to what they name.
    """
    known = ref(app)

    def methods() -> Set[str]:
        alive = known()
        if alive is None:
            return METHODS
        named = {name for rule in alive.url_map.iter_rules() for name in rule.methods or ()}
        return METHODS.union(filter(_NAME.fullmatch, named))

    return methods
