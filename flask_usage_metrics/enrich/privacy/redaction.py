"""Replaces secrets in query strings, paths, URLs and JSON values by ``REDACTED``."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from flask_usage_metrics.enrich.privacy.rules import segments_of, without
from flask_usage_metrics.enrich.privacy.secrets import REDACTED, SecretFinder
from flask_usage_metrics.enrich.privacy.structure import (
    decodings,
    holds_userinfo,
    replace_userinfo,
)

_CACHED = 2048
_MAX_CACHED_TEXT = 512
_MAX_DEPTH = 32

_BETWEEN_PAIRS = re.compile(r"([&;])")
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#]*)([^?#]*)")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]*(?:%[\w.~-]+)?\]|[^\s:%\[\]]*)(?::[0-9]*)?")


class Redactor:
    """Replaces what is secret by its name or by its shape.

    Short queries and paths are remembered, each by itself: many paths have the same query, and one
    path has many queries.

    Args:
        secrets: Tells what is secret.
    """

    def __init__(self, secrets: SecretFinder) -> None:
        self._is_secret_name = secrets.is_secret_name
        self._is_secret_encoded_name = secrets.is_secret_encoded_name
        self._hides_secret = secrets.hides_secret
        self._names_secret = secrets.names_secret
        # Of the instance: a cache of the class would keep every instance alive.
        self._known_query = lru_cache(_CACHED)(self._redacted_query)
        self._known_path = lru_cache(_CACHED)(self._redacted_path)
        self._hides_variable = lru_cache(_CACHED)(self._look_for_variable)

    def query(self, query: str) -> str:
        """Return a query string without secrets; all else stays as it is, byte for byte.

        A value is secret by its name, by its shape, or because it holds a pair with a secret name
        or userinfo, as a percent-encoded URL does. Nothing stands in place of a value that is
        empty. What follows a secret after ``;`` is part of it, unless it is a pair.

        Args:
            query: Pairs separated by ``&`` or ``;``, percent-encoded.
        """
        if len(query) <= _MAX_CACHED_TEXT:
            return self._known_query(query)
        return self._redacted_query(query)

    def values(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return JSON values without secrets: texts that hold one, and values of secret name.

        Args:
            values: Left as they are. What is nested more than 32 deep counts as secret.

        Returns:
            The same object when nothing is secret. None stays None under any name.
        """
        return self._mapping(values, False, 0)

    def variables(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return the app's own values without secrets.

        As `values`, but numbers and booleans stay under any name: ``{"tokens_used": 512}``.

        Args:
            values: JSON values.
        """
        return self._mapping(values, True, 0)

    def is_secret_rule(self, rule: str) -> bool:
        """Tell whether a URL rule has a variable with a secret name."""
        return self._hides_variable(rule)

    def path(
        self, path: str, rule: str | None = None, arguments: dict[str, Any] | None = None
    ) -> str:
        """Return a path without secrets.

        Segments that hold a secret are replaced, and so are the parts that belong to an argument
        of the view which is secret by name or holds one. A value may have slashes in it: what
        follows a pair with a secret name is cut, up to the next ``;`` or ``?``. What stands after a
        ``?``, which came encoded, is treated as a query.

        Args:
            path: Decoded, below the app's root.
            rule: The URL rule it matched, such as ``"/reset/<token>"``; None: none.
            arguments: JSON values of the view's arguments.

        Returns:
            The path; the rule when the path does not fit it and it has a secret argument.
        """
        if rule is not None and "<" in rule:
            parts, given = segments_of(rule), arguments or {}
            secret = frozenset(
                name
                for segment in parts
                for name in segment.variables
                if self._is_secret_argument(name, given.get(name))
            )
            if secret:
                redacted = without(secret, path, parts, given)
                if redacted is None:
                    return rule
                path = redacted
        if len(path) <= _MAX_CACHED_TEXT:
            return self._known_path(path)
        return self._redacted_path(path)

    def url(self, url: str) -> str:
        """Return scheme, host, port and path of a URL; the path without secrets.

        Args:
            url: Such as a Referer header; may be anything.

        Returns:
            Without user info, query and fragment; ``""`` when it is not ``scheme://host``, or has
            a backslash before the query: it ends the host to some, and not to others.
        """
        found = _URL.match(url)
        if found is None or "\\" in found[0]:
            return ""
        scheme, authority, path = found.groups()
        host = authority.rpartition("@")[2]
        # Links into mobile apps may have a token in the place of the host.
        return f"{scheme}://{self._redacted_path(host + path)}" if _HOST.fullmatch(host) else ""

    def _redacted_query(self, query: str) -> str:
        parts = _BETWEEN_PAIRS.split(query)
        is_open = False
        for at in range(0, len(parts), 2):
            pair = parts[at]
            if not pair:
                continue
            if is_open and parts[at - 1] == ";" and "=" not in pair:
                parts[at] = REDACTED
                continue
            parts[at] = self._redacted_pair(pair)
            is_open = parts[at].endswith(f"={REDACTED}")
        return "".join(parts)

    def _redacted_pair(self, pair: str) -> str:
        name, equals, value = pair.partition("=")
        if self._hides_secret(name):
            return REDACTED + equals + (REDACTED if value else "")
        if value and (self._is_secret_encoded_name(name) or self._hides_secret(value)):
            return f"{name}={REDACTED}"
        return pair

    def _redacted_path(self, path: str) -> str:
        path, mark, query = path.partition("?")
        if ";" in path:
            path = ";".join(map(self._redacted_segments, path.split(";")))
        else:
            path = self._redacted_segments(path)
        return path + mark + self._redacted_query(query)

    def _redacted_segments(self, path: str) -> str:
        if "@" in path and holds_userinfo(path):
            path = replace_userinfo(path, REDACTED)
        segments = path.split("/")
        for at, segment in enumerate(segments):
            # A referrer's is still percent-encoded.
            if not self._hides_secret(segment):
                continue
            name, equals, _ = segment.partition("=")
            is_plain = equals and not self._hides_secret(name)
            is_named = is_plain and self._is_secret_encoded_name(name)
            segments[at] = f"{name}={REDACTED}" if is_named else REDACTED
            if is_named or any(map(self._names_secret, decodings(segment) or ())):
                return "/".join(segments[: at + 1])
        return "/".join(segments)

    def _look_for_variable(self, rule: str) -> bool:
        return any(
            self._is_secret_name(name)
            for segment in segments_of(rule)
            for name in segment.variables
        )

    def _is_secret_argument(self, name: str, value: Any) -> bool:
        # By name even without a value: apps take arguments out, as they do with lang_code.
        return self._is_secret_name(name) or (
            isinstance(value, str) and (value == REDACTED or self._hides_secret(value))
        )

    def _mapping(self, values: dict[str, Any], keep_numbers: bool, depth: int) -> dict[str, Any]:
        changed = {}
        for name, value in values.items():
            if value is None or (keep_numbers and isinstance(value, int | float)):
                continue
            if self._is_secret_name(name):
                redacted: Any = value if value == REDACTED else REDACTED
            else:
                redacted = self._value(value, keep_numbers, depth)
            if redacted is not value:
                changed[name] = redacted
        return {**values, **changed} if changed else values

    def _value(self, value: Any, keep_numbers: bool, depth: int) -> Any:
        if isinstance(value, str):
            return REDACTED if self._hides_secret(value) else value
        if not isinstance(value, dict | list):
            return value
        if depth >= _MAX_DEPTH:
            return REDACTED
        if isinstance(value, dict):
            return self._mapping(value, keep_numbers, depth + 1)
        items = [self._value(item, keep_numbers, depth + 1) for item in value]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
