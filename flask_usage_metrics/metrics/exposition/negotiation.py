"""Which format a scrape is answered in, by its Accept header."""

from __future__ import annotations

from werkzeug.http import parse_accept_header, parse_options_header

TEXT = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of Prometheus' text format."""

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
"""Content type of the OpenMetrics format."""


def prefers_openmetrics(accept: str) -> bool:
    """Tell whether an Accept header wants OpenMetrics rather than Prometheus' text format.

    Only versions that we write count, so anything malformed is answered with text.
    """
    best = {True: 0.0, False: 0.0}
    for value, quality in parse_accept_header(accept[:2048]):
        kind, options = parse_options_header(value)
        openmetrics = kind == "application/openmetrics-text"
        if openmetrics and options.get("version", "1.0.0") not in ("1.0.0", "0.0.1"):
            continue
        if openmetrics or kind in ("text/plain", "text/*", "*/*"):
            best[openmetrics] = max(best[openmetrics], quality)
    return best[True] > 0 and best[True] >= best[False]
