"""The variables of a URL rule in a path: replaced where they are secret."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from flask_usage_metrics.enrich.privacy.secrets import REDACTED

_CACHED = 2048

# As Werkzeug reads its rules (werkzeug.routing.rules._part_re).
_VARIABLE = re.compile(r"<(?:([a-zA-Z_][a-zA-Z0-9_]*)(?:\(.*?\))?:)?([a-zA-Z_][a-zA-Z0-9_]*)>")
_ONE_SEGMENT = frozenset(("", "default", "string", "any", "int", "float", "uuid"))


class Segment(NamedTuple):
    """The part of a rule between two slashes.

    Attributes:
        texts: The fixed texts before, between and after the variables.
        variables: Their names.
        wide: Whether one of them may have slashes in it.
    """

    texts: tuple[str, ...]
    variables: tuple[str, ...]
    wide: bool


@lru_cache(_CACHED)
def segments_of(rule: str) -> tuple[Segment, ...]:
    """Return the segments of a URL rule, such as ``"/reset/<token>"``, in their order."""
    segments = []
    found = iter(_VARIABLE.findall(rule))
    # The arguments of a converter may have slashes; no rule has NUL.
    for text in _VARIABLE.sub("\0", rule).removesuffix("/").split("/"):
        texts = tuple(text.split("\0"))
        variables = [next(found) for _ in texts[1:]]
        wide = any(converter not in _ONE_SEGMENT for converter, _ in variables)
        segments.append(Segment(texts, tuple(name for _, name in variables), wide))
    return tuple(segments)


def without(
    secret: frozenset[str], path: str, rule: Sequence[Segment], arguments: dict[str, Any]
) -> str | None:
    """Return a path without the parts of its secret variables; None if it does not fit the rule.

    Args:
        secret: Names of variables.
        path: Decoded, below the app's root; may have been cut.
        rule: As `segments_of` returns it.
        arguments: JSON values of the view's arguments.
    """
    # Not by a regular expression made from the rule: where several variables share a segment, a
    # path that was cut, and so fits no more, takes it polynomial time.
    bare = path.removesuffix("/")
    texts = bare.split("/")
    if extra := len(texts) - len(rule):
        wide = [at for at, segment in enumerate(rule) if segment.wide]
        if extra < 0 or len(wide) != 1:
            return None
        start, end = wide[0], wide[0] + extra + 1
        texts[start:end] = ["/".join(texts[start:end])]
    redacted = []
    for segment, text in zip(rule, texts, strict=True):
        first, last = segment.texts[0], segment.texts[-1]
        varying = text[len(first) : len(text) - len(last)]
        if not segment.variables:
            if text != first:
                return None
        elif not varying or text != first + varying + last:
            return None
        elif not secret.isdisjoint(segment.variables):
            text = first + _varying_without(secret, varying, segment, arguments) + last
        redacted.append(text)
    return "/".join(redacted) + path[len(bare) :]


def _varying_without(
    secret: frozenset[str], text: str, segment: Segment, arguments: dict[str, Any]
) -> str:
    between = segment.texts[1:-1]
    # The values tell where "a-b-c" is cut for "<x>-<y>", unless they were converted, as 005 to 5.
    parts = [str(arguments.get(name)) for name in segment.variables]
    if _joined(parts, between) != text:
        parts = re.split("|".join(map(re.escape, between)), text) if between else [text]
        if len(parts) != len(segment.variables) or _joined(parts, between) != text:
            return REDACTED  # it could be cut in several ways
    named = zip(segment.variables, parts, strict=True)
    return _joined([REDACTED if name in secret else part for name, part in named], between)


def _joined(parts: Sequence[str], between: Sequence[str]) -> str:
    return "".join(part + separator for part, separator in zip(parts, (*between, ""), strict=True))
