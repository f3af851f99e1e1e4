"""address -> ISO code: header, MMDB, iptocc, HTTP service, function of the app.

`CountryLookup` asks one `CountrySource` after the other; `sources` makes them from the settings.
"""

from __future__ import annotations

from flask_usage_metrics.enrich.country.answer import Answer
from flask_usage_metrics.enrich.country.limits import Limits
from flask_usage_metrics.enrich.country.lookup import CountryLookup
from flask_usage_metrics.enrich.country.sources import make_country_lookup

__all__ = ["Answer", "CountryLookup", "Limits", "make_country_lookup"]
