"""The answer of a source of countries, and the codes that are countries."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

_CODES = """
    AD AE AF AG AI AL AM AO AQ AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ
    BR BS BT BV BW BY BZ CA CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM
    DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GS
    GT GU GW GY HK HM HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP KE KG KH KI KM KN
    KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ
    MR MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM
    PN PR PS PT PW PY QA RE RO RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV
    SX SY SZ TC TD TF TG TH TJ TK TL TM TN TO TR TT TV TW TZ UA UG UM US UY UZ VA VC VE VG VI
    VN VU WF WS YE YT ZA ZM ZW
    XK
"""

ISO_CODES = frozenset(_CODES.split())
"""The 249 codes of ISO 3166-1 alpha-2 (as in the tz database's ``iso3166.tab``), and Kosovo's
``XK``, which ISO left to its users and MaxMind, Cloudflare and CLDR use."""


class Answer(msgspec.Struct, frozen=True):
    """The country of an address, and what else a service told of it.

    Attributes:
        country: One of `ISO_CODES`; None: unknown.
        ip_info: What an HTTP service answered, as JSON values; nobody else has this dict.
    """

    country: str | None = None
    ip_info: dict[str, Any] | None = None


UNKNOWN = Answer()

KNOWN = {code: Answer(code) for code in ISO_CODES}
"""The answer of each country, made once: a lookup costs less than that."""


def as_answer(code: object) -> Answer:
    """Return the answer of a country code in either case; of anything else `UNKNOWN`."""
    # "ß".upper() is "SS", which is South Sudan.
    if isinstance(code, str) and len(code) == 2 and code.isascii():
        return KNOWN.get(code.upper(), UNKNOWN)
    return UNKNOWN


class CountrySource(Protocol):
    """A place to learn a country from, which answers at once.

    Attributes:
        is_static: Whether its answer to an address is the same for ever.
    """

    is_static: bool

    def locate(self, address: str | None, headers: tuple[str, ...], trusted: bool) -> Answer | None:
        """Answer at once, as `CountryLookup.locate`; an exception is a fault of the source."""
