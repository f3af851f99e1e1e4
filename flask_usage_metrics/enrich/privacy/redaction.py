"""Secrets in what strangers send: which names and shapes they have, and their replacement."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise, product
from typing import Any, NamedTuple
from urllib.parse import unquote, unquote_plus

from flask_usage_metrics.errors import ConfigError

REDACTED = "REDACTED"
"""What stands in place of a secret."""

_CACHED = 2048
_MAX_CACHED_TEXT = 512
_MAX_NAME = 200
_MAX_DEPTH = 32
_DECODINGS = 3

# ------------------------------------------------------------------------ names

_ANYWHERE = (
    *("token", "secret", "passw", "passphrase", "passcode", "pwd"),
    *("apikey", "accesskey", "privatekey", "credential", "signature"),
    *("session", "jwt", "email", "csrf", "xsrf"),
)
# Words only: author, monkey, design, postcode, passenger and shopping are no secrets.
_WORDS = frozenset(
    (
        *("key", "keys", "auth", "code", "sig", "pass", "pin", "otp", "sid"),
        *("cvv", "cvc", "ssn", "oauth", "bearer", "authorization"),
    )
)
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # AWSAccessKeyId: AWS, Access, Key, Id


def _plain(name: str) -> str:
    """Return a name without the accents and the full-width letters it may be spelled with."""
    if name.isascii():
        return name
    decomposed = unicodedata.normalize("NFKD", name)
    return "".join(char for char in decomposed if not unicodedata.combining(char))


def _squeezed(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


_BETWEEN_NAMES = re.compile(r"[&;?#/\s,\"'(){}<>]+")
_JSON_NAME = re.compile(r'"([^"]{1,200})"\s*:')


def _names_in(text: str) -> list[str]:
    """Return the names of the ``name=value`` and ``"name": value`` pairs in a text."""
    names = _JSON_NAME.findall(text) if '"' in text else []
    if "=" in text:
        # Not by one regular expression: searching for [^=]+= takes quadratic time without "=".
        for pair in _BETWEEN_NAMES.split(text):
            names += pair.split("=")[:-1]
    return names


# ------------------------------------------------------------------------ shapes

_LEAST_RANDOM = 24
_ODD_PAIRS = 8
"""So many odd pairs in 24 characters make them random.

Measured: random letters and digits have 15 on average, and nowhere 8 in 0.3 % of tokens of 24; the
words of slugs have 1, and somewhere 8 in 0.07 % of the 99 000 long ones among those made from
messages in 37 languages.
"""

# First letters, each with its usual followers: the 320 commonest pairs in the words, accents taken
# off, of the gettext catalogues of Debian 12 for cs da de en es fi fr hu id it nl pl pt ro
# sv tr vi. In words 5 % of the pairs are others, in random text 53 %.
_FOLLOWERS = (
    "aabcdefghijklmnoprstuvwyz baeilorsu cacehiklorstu dadeilnorsu eabcdefghijklmnoprstuvwxyz "
    "faefiloru gaeghilnorsu haeiortu iabcdefgijklmnoprstuvxyz jaeiou kaehiklorstuy "
    "ladegiklmnostuy mabeilmopsu nacdefghijklnostuvyz oabcdefghiklmnoprstuvwz paehiloprstu qu "
    "rabcdegiklmnoprstuvyz sacehiklmnopstuyz tacehiklnorstuy uabcdefgijklmnoprstvz vaeioy "
    "waeio xit yaceimnopstu zaeinou"
)
_USUAL_PAIRS = frozenset(row[0] + other for row in _FOLLOWERS.split() for other in row[1:])


def _is_odd(first: str, second: str) -> bool:
    """Tell whether two letters or digits stand side by side in random text rather than in words."""
    if first.isdigit() or second.isdigit():
        return first.isdigit() != second.isdigit()
    if first.islower() and second.isupper():
        return True
    # Nor are repeated letters random: "aaaaaah", "XXXXXXXX".
    return first.lower() != second.lower() and (first + second).lower() not in _USUAL_PAIRS


@cache
def _odd_pairs() -> frozenset[str]:
    # Made when a long run of characters is first seen: 2 ms and 0.3 MB.
    return frozenset(
        first + second
        for first, second in product(string.ascii_letters + string.digits, repeat=2)
        if _is_odd(first, second)
    )


_HUMP = re.compile(r"[a-z](?=[A-Z][a-z])")

_RUN = re.compile(r"[A-Za-z0-9_\-+=.~]{24,}")
# Base64 has slashes too, which separate anywhere else.
_BASE64_RUN = re.compile(r"[A-Za-z0-9+/=]{24,}")
_LONG_HEX = re.compile(r"[0-9A-Fa-f]{32,}")
# A UUID, or an ObjectId of MongoDB, which begins with the seconds since the epoch: of 2004 to 2038.
_ORDINARY_ID = re.compile(
    r"(?<![0-9A-Za-z])(?:[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}|[4-7][0-9a-f]{23})"
    r"(?![0-9A-Za-z])"
)


def _holds_random(text: str) -> bool:
    """Tell whether a text holds a long random token."""
    text = _ORDINARY_ID.sub(" ", text)
    return any(map(_is_random, _RUN.findall(text))) or (
        "/" in text and any(map(_is_random, _BASE64_RUN.findall(text)))
    )


def _is_random(run: str) -> bool:
    # Of 32 hexadecimal digits 1.5 % have too few odd pairs.
    if any(not (digits.isdigit() or digits.isalpha()) for digits in _LONG_HEX.findall(run)):
        return True
    pairs = _odd_pairs()
    odd = [at for at, pair in enumerate(map(str.__add__, run, run[1:])) if pair in pairs]
    if len(odd) < _ODD_PAIRS:
        return False
    humps = {hump.start() for hump in _HUMP.finditer(run)}  # camelCase is made of words
    odd = [at for at in odd if at not in humps]
    # In any 24 characters: the words around a token must not hide it.
    return any(
        last + 1 - first < _LEAST_RANDOM
        for first, last in zip(odd, odd[_ODD_PAIRS - 1 :], strict=False)
    )


_JWT_RUN = re.compile(r"[A-Za-z0-9_.-]+")
# '{"' in base64; inside a word, as in monkeyJar.tar.gz, only if much follows.
_JWT_HEADER = re.compile(r"(?:^|[^A-Za-z0-9])eyJ|eyJ[A-Za-z0-9_-]{10}")


def _holds_jwt(text: str) -> bool:
    # A third part follows, even if nobody has signed.
    return any(
        payload and _JWT_HEADER.search(header)
        for run in _JWT_RUN.findall(text)
        for header, payload in pairwise(run.split(".")[:-1])
    )


# Not the image@2x.png of retina screens, nor the path of medium.com/@someone.there.
_EMAIL = re.compile(r"[^\s@/=&?]@(?!\dx\.)(?:[\w-]+\.)+[^\W\d_]{2}")

# ------------------------------------------------------------------------ rules

# As Werkzeug reads its rules (werkzeug.routing.rules._part_re).
_VARIABLE = re.compile(r"<(?:([a-zA-Z_][a-zA-Z0-9_]*)(?:\(.*?\))?:)?([a-zA-Z_][a-zA-Z0-9_]*)>")
_ONE_SEGMENT = frozenset(("", "default", "string", "any", "int", "float", "uuid"))


class _Segment(NamedTuple):
    """What a rule has between two slashes.

    Attributes:
        texts: The fixed texts before, between and after the variables.
        variables: Their names.
        wide: Whether one of them may have slashes in it.
    """

    texts: tuple[str, ...]
    variables: tuple[str, ...]
    wide: bool


@lru_cache(_CACHED)
def _segments(rule: str) -> tuple[_Segment, ...]:
    segments = []
    found = iter(_VARIABLE.findall(rule))
    # The arguments of a converter may have slashes; no rule has NUL.
    for text in _VARIABLE.sub("\0", rule).removesuffix("/").split("/"):
        texts = tuple(text.split("\0"))
        variables = [next(found) for _ in texts[1:]]
        wide = any(converter not in _ONE_SEGMENT for converter, _ in variables)
        segments.append(_Segment(texts, tuple(name for _, name in variables), wide))
    return tuple(segments)


def _without(
    secret: frozenset[str], path: str, rule: Sequence[_Segment], arguments: dict[str, Any]
) -> str | None:
    """Return a path without the parts of its secret variables; None if it does not fit the rule.

    Not by a regular expression made from the rule: where several variables share a segment, a path
    that was cut, and so fits no more, takes it polynomial time.
    """
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
    secret: frozenset[str], text: str, segment: _Segment, arguments: dict[str, Any]
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


# ------------------------------------------------------------------------ what is used

_PAIR = re.compile(r"[^&;]+")
# A backslash is a slash to browsers, so it ends the host too.
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://([^/?#\\]*)([^?#]*)")
_HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]*(?:%[\w.~-]+)?\]|[^\s:%\[\]]*)(?::[0-9]*)?")


class Redactor:
    """Finds what is secret by its name or by its shape, and replaces it by ``REDACTED``.

    Secret names are those of passwords, tokens, keys, signatures, codes and e-mail addresses, in
    any spelling: ``X-Amz-Signature``, ``apiKey``, ``user[password]``; also ``country_code``, whose
    ``code`` could be one to log in with. Secret shapes are JSON Web Tokens and random tokens of 24
    and more characters, which UUIDs and ObjectIds are not.

    Args:
        parts: Parts of names that are secret besides the usual ones (TRACK_USAGE_REDACT); case and
            separators do not matter.
        emails: Whether values that look like an e-mail address are replaced as well.

    Raises:
        ConfigError: A part has no letter and no digit, so that it would be in every name.
    """

    def __init__(self, parts: Sequence[str] = (), *, emails: bool = False) -> None:
        squeezed = [_squeezed(_plain(part)) for part in parts]
        for part, rest in zip(parts, squeezed, strict=True):
            if not rest:
                raise ConfigError(
                    f"TRACK_USAGE_REDACT must hold parts of names with a letter or digit, "
                    f"not {part!r}"
                )
        self._anywhere = re.compile("|".join(map(re.escape, (*_ANYWHERE, *squeezed))))
        self._emails = emails
        # Of the instance: a cache of the class would keep every instance alive.
        self._knows_name = lru_cache(_CACHED)(self._look_up)
        self._known_query = lru_cache(_CACHED)(self._redacted_query)
        self._known_path = lru_cache(_CACHED)(self._redacted_path)
        self._known_url = lru_cache(_CACHED)(self._redacted_url)
        self._hides_variable = lru_cache(_CACHED)(self._look_for_variable)

    def is_secret_name(self, name: str) -> bool:
        """Tell whether a name is one of secrets; one of more than 200 characters always is."""
        # Before the cache, which would keep a megabyte as its key.
        return len(name) > _MAX_NAME or self._knows_name(name)

    def is_secret_text(self, text: str) -> bool:
        """Tell whether a text, as it is, holds something of a secret's shape."""
        return (
            (len(text) >= _LEAST_RANDOM and _holds_random(text))
            or ("eyJ" in text and _holds_jwt(text))
            or (self._emails and "@" in text and _EMAIL.search(text) is not None)
        )

    def query(self, query: str) -> str:
        """Return a query string without secrets; all else stays as it is, byte for byte.

        A value is secret by its name, by its shape, or because it holds a pair with a secret name,
        as a percent-encoded URL does. Nothing stands in place of a value that is empty.

        Args:
            query: Pairs separated by ``&`` or ``;``, percent-encoded.
        """
        if len(query) <= _MAX_CACHED_TEXT:
            return self._known_query(query)
        return self._redacted_query(query)

    def values(self, values: dict[str, Any]) -> dict[str, Any]:
        """Return JSON values without secrets, which are texts of their shape or have their name.

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

        Segments that are secret by shape are replaced, and so are the parts that belong to an
        argument of the view which is secret by name or by shape.

        Args:
            path: Decoded, below the app's root.
            rule: The URL rule it matched, such as ``"/reset/<token>"``; None: none.
            arguments: JSON values of the view's arguments.

        Returns:
            The path; the rule when the path does not fit it and it has a secret argument.
        """
        if rule is not None and "<" in rule:
            segments, given = _segments(rule), arguments or {}
            secret = frozenset(
                name
                for segment in segments
                for name in segment.variables
                if self._is_secret_argument(name, given.get(name))
            )
            if secret:
                redacted = _without(secret, path, segments, given)
                if redacted is None:
                    return rule
                path = redacted
        if len(path) <= _MAX_CACHED_TEXT:
            return self._known_path(path)
        return self._redacted_path(path)

    def url(self, url: str) -> str:
        """Return scheme, host, port and path of a URL; the path without segments of secret shape.

        Args:
            url: Such as a Referer header; may be anything.

        Returns:
            Without user info, query and fragment; ``""`` when it is not ``scheme://host``.
        """
        return self._known_url(url) if len(url) <= _MAX_CACHED_TEXT else self._redacted_url(url)

    def _look_up(self, name: str) -> bool:
        name = _plain(name)
        if self._anywhere.search(_squeezed(name)):
            return True
        return any(word.lower() in _WORDS for word in _WORD.findall(name))

    def _hides_secret(self, text: str) -> bool:
        """Tell whether a percent-encoded text holds a secret, by shape or as a pair."""
        if len(text) < _LEAST_RANDOM and text.isalnum():
            return False
        # More than once: a URL in a URL in a URL is what sign-in pages are sent.
        for _ in range(_DECODINGS):
            decoded = unquote(text)
            if self.is_secret_text(decoded) or any(map(self.is_secret_name, _names_in(decoded))):
                return True
            if decoded == text:
                break
            text = decoded
        return False

    def _redacted_query(self, query: str) -> str:
        return _PAIR.sub(self._redacted_pair, query)

    def _redacted_pair(self, found: re.Match[str]) -> str:
        pair = found[0]
        name, equals, value = pair.partition("=")
        if self._hides_secret(name):
            return REDACTED + equals + (REDACTED if value else "")
        if value and (self.is_secret_name(unquote_plus(name)) or self._hides_secret(value)):
            return f"{name}={REDACTED}"
        return pair

    def _redacted_url(self, url: str) -> str:
        found = _URL.match(url)
        if found is None:
            return ""
        scheme, authority, path = found.groups()
        host = authority.rpartition("@")[2]
        # Links into mobile apps may have a token in the place of the host.
        return f"{scheme}://{self.path(host + path)}" if _HOST.fullmatch(host) else ""

    def _redacted_path(self, path: str) -> str:
        # A referrer's is still percent-encoded.
        return "/".join(
            REDACTED if self.is_secret_text(unquote(segment)) else segment
            for segment in path.split("/")
        )

    def _look_for_variable(self, rule: str) -> bool:
        return any(
            self.is_secret_name(name) for segment in _segments(rule) for name in segment.variables
        )

    def _is_secret_argument(self, name: str, value: Any) -> bool:
        # By name even without a value: apps take arguments out, as they do with lang_code.
        return self.is_secret_name(name) or (
            isinstance(value, str) and (value == REDACTED or self.is_secret_text(value))
        )

    def _mapping(self, values: dict[str, Any], keep_numbers: bool, depth: int) -> dict[str, Any]:
        changed = {}
        for name, value in values.items():
            if value is None or (keep_numbers and isinstance(value, int | float)):
                continue
            if self.is_secret_name(name):
                redacted: Any = value if value == REDACTED else REDACTED
            else:
                redacted = self._value(value, keep_numbers, depth)
            if redacted is not value:
                changed[name] = redacted
        return {**values, **changed} if changed else values

    def _value(self, value: Any, keep_numbers: bool, depth: int) -> Any:
        if isinstance(value, str):
            return REDACTED if self.is_secret_text(value) else value
        if not isinstance(value, dict | list):
            return value
        if depth >= _MAX_DEPTH:
            return REDACTED
        if isinstance(value, dict):
            return self._mapping(value, keep_numbers, depth + 1)
        items = [self._value(item, keep_numbers, depth + 1) for item in value]
        return items if any(a is not b for a, b in zip(items, value, strict=True)) else value
