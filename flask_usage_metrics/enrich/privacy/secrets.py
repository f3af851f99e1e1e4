"""Secrets in what strangers send: the names they have, and the shapes."""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import pairwise, product

from flask_usage_metrics.enrich.privacy.structure import decodings, holds_userinfo, names_in
from flask_usage_metrics.errors import ConfigError

REDACTED = "REDACTED"
"""Stands in place of a secret."""

_CACHED = 2048
_MAX_NAME = 200

# ------------------------------------------------------------------------ names

_ANYWHERE = (
    *("token", "secret", "passw", "passphrase", "passcode", "pwd", "credential", "signature"),
    *("apikey", "accesskey", "privatekey", "authkey", "sshkey", "masterkey", "signingkey"),
    *("encryptionkey", "streamkey", "licensekey", "authcode", "accesscode", "invitecode"),
    *("pincode", "smscode", "verificationcode", "recoverycode", "mnemonic"),
    *("session", "sessid", "cookie", "jwt", "saml", "email", "csrf", "xsrf", "hmac", "totp"),
    *("creditcard", "cardnumber", "cardno", "ccnumber", "accountnumber", "accountno"),
    *("socialsecurity", "taxid", "passport"),
)
# Words only: author, monkey, design, postcode, dashboard, taliban and shopping are no secrets.
_WORDS = frozenset(
    (
        *("key", "keys", "auth", "code", "sig", "pass", "pw", "pin", "puk", "otp", "hotp", "mfa"),
        *("sid", "sess", "oauth", "bearer", "authorization", "creds", "cred", "nonce", "salt"),
        *("ticket", "tickets", "invite", "assertion", "card", "cc", "cvv", "cvc", "cvn", "csc"),
        *("iban", "ssn"),
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

# ------------------------------------------------------------------------ both


class SecretFinder:
    """Tells what is secret by its name or by its shape.

    Secret names are those of passwords, tokens, keys, signatures, codes, sessions, cards, accounts
    and e-mail addresses, in any spelling: ``X-Amz-Signature``, ``apiKey``, ``user[password]``; also
    ``country_code``, whose ``code`` could be one to log in with. Secret shapes are JSON Web Tokens
    and random tokens of 24 and more characters, which UUIDs and ObjectIds are not.

    Args:
        parts: Parts of names that are secret besides the usual ones (TRACK_USAGE_REDACT); case and
            separators do not matter.
        emails: Whether texts that look like an e-mail address are secret as well.

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

    def is_secret_encoded_name(self, name: str) -> bool:
        """Tell whether a percent-encoded name is one of secrets, however often it was encoded."""
        if "%" not in name and "+" not in name:
            return self.is_secret_name(name)
        levels = decodings(name.replace("+", " "))
        return levels is None or any(map(self.is_secret_name, levels[1:] or levels))

    def hides_secret(self, text: str) -> bool:
        """Tell whether a text holds a secret: by its shape, in a pair, or in a URL's userinfo.

        Args:
            text: As it is, or percent-encoded, several times even; too many times, and it counts
                as one that does.
        """
        if len(text) < _LEAST_RANDOM and text.isalnum():
            return False
        levels = decodings(text)
        if levels is None:
            return True
        # Of an encoded text as it is only userinfo: its password may have a slash that is encoded.
        return any(map(holds_userinfo, levels)) or any(
            self.is_secret_text(level) or self.names_secret(level) for level in levels[1:] or levels
        )

    def names_secret(self, text: str) -> bool:
        """Tell whether a decoded text has a pair with a secret name."""
        return any(map(self.is_secret_name, names_in(text)))

    def _look_up(self, name: str) -> bool:
        name = _plain(name)
        if self._anywhere.search(_squeezed(name)):
            return True
        return any(word.lower() in _WORDS for word in _WORD.findall(name))
