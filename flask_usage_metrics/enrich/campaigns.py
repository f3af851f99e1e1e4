"""The campaign that brought a visitor, as the query string of the landing page names it."""

from __future__ import annotations

from urllib.parse import unquote_plus

from flask_usage_metrics.enrich.cleaning import app_text

_MOST_CHARACTERS = 256

CampaignFields = tuple[str | None, str | None, str | None, str | None]
"""The fields of a record `utm_source`, `utm_medium`, `utm_campaign` and `ref`."""

NAMES = ("utm_source", "utm_medium", "utm_campaign", "ref")
"""Names of the parameters, and of the fields. Three are Google Analytics' (urchin tracking module),
which all tools for campaigns write; ``ref`` is what directories and newsletters add."""

NO_CAMPAIGN: CampaignFields = (None, None, None, None)


def campaign_of(query: str) -> CampaignFields:
    """Return the campaign fields of a query string, each at most 256 characters.

    Args:
        query: Pairs separated by ``&``, percent-encoded, without secrets. Of several values of one
            name the first that is not blank holds; names are told by case.
    """
    if "utm_" not in query and "ref=" not in query:
        return NO_CAMPAIGN
    found: dict[str, str] = {}
    for pair in query.split("&"):
        name, _, value = pair.partition("=")
        if name in NAMES and name not in found:
            text = app_text(unquote_plus(value)).strip()[:_MOST_CHARACTERS]
            if text:
                found[name] = text
    source, medium, campaign, ref = map(found.get, NAMES)
    return source, medium, campaign, ref
