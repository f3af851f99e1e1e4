"""User-Agent header -> kind of client, by names.txt, else by isbot's patterns in bots.txt."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from importlib import resources

KINDS = (
    "human",
    "ai-training",
    "ai-search",
    "ai-agent",
    "monitor",
    "feed",
    "preview",
    "search-bot",
    "script",
    "other-bot",
)
"""Every kind of client that a User-Agent header tells; a name's kind is found in this order."""


def kind_of(user_agent: str) -> str:
    """Return which of `KINDS` a User-Agent header belongs to.

    A known name decides; else isbot's patterns tell a bot from a person.
    """
    lower = user_agent.lower().strip()
    if not lower:
        return "other-bot"
    return _named(lower) or ("other-bot" if _looks_like_a_bot(lower) else "human")


def load() -> None:
    """Read both files, once a process; without it the first `kind_of` does.

    Raises:
        OSError: A file cannot be read; the next call tries again.
    """
    _names()
    _bot_patterns()


def named_kinds() -> dict[str, str]:
    """Return the kind of each name in names.txt; one that must begin the header starts with ^."""
    kinds: dict[str, str] = {}
    kind = ""
    for line in _lines("names.txt"):
        if line.startswith("["):
            kind = line[1:-1]
        else:
            kinds[line.partition("\t")[0]] = kind
    return kinds


# Read when an app is set up, not when the package is imported: that stays cheap.


def _lines(name: str) -> list[str]:
    text = (resources.files(__package__) / name).read_text("ascii")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


@cache
def _names() -> tuple[dict[str, str], re.Pattern[str], re.Pattern[str]]:
    kinds = named_kinds()
    anywhere = _any_of(name for name in kinds if name[0] != "^")
    leading = _any_of(name[1:] for name in kinds if name[0] == "^")
    return (
        kinds,
        re.compile(f"{leading}(?![a-z0-9])"),
        re.compile(f"(?<![a-z0-9]){anywhere}(?![a-z0-9])"),
    )


def _any_of(names: Iterable[str]) -> str:
    """Return an expression for any of the names, the longest that fits.

    By first letter: `re` tries the branches one by one, and so has fewer to try.
    """
    by_letter: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        by_letter.setdefault(name[0], []).append(re.escape(name[1:]))
    letters = (f"{letter}(?:{'|'.join(rests)})" for letter, rests in by_letter.items())
    return f"(?:{'|'.join(letters)})"


def _named(lower: str) -> str | None:
    kinds, leading, anywhere = _names()
    found = [kinds[name] for name in anywhere.findall(lower)]
    if first := leading.match(lower):
        found.append(kinds["^" + first[0]])
    return min(found, key=KINDS.index, default=None)


@cache
def _bot_patterns() -> tuple[tuple[str, ...], re.Pattern[str], re.Pattern[str]]:
    literals, leading, anywhere = [], [], []
    for pattern in _lines("bots.txt"):
        if pattern.startswith("^"):
            leading.append(pattern)
        elif re.fullmatch(r"(?:[^\\^$.|?*+()\[\]{}]|\\\W)+", pattern, re.ASCII):
            literals.append(re.sub(r"\\(\W)", r"\1", pattern))
        else:
            anywhere.append(pattern)
    # Apart, as one expression of all would be tried at every position. Text and patterns are lower
    # case, so that IGNORECASE is not needed.
    return (
        tuple(literals),
        re.compile("|".join(leading), re.ASCII),
        re.compile("|".join(anywhere), re.ASCII),
    )


def _looks_like_a_bot(lower: str) -> bool:
    # Apps for Android name the library after themselves, as apps for iOS name CFNetwork; isbot
    # sees its "http". A header that begins with it is a script's, by its name.
    lower = lower.replace("okhttp", "")
    literals, leading, anywhere = _bot_patterns()
    return (
        any(literal in lower for literal in literals)
        or leading.match(lower) is not None
        or anywhere.search(lower) is not None
    )
