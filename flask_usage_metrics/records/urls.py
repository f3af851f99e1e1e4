"""The URL of a request, put together as Flask's ``request.url`` is."""

from __future__ import annotations

import re
from urllib.parse import quote

from werkzeug.sansio.utils import get_current_url

_USUAL_PORTS = {"http": ":80", "https": ":443"}

# What Flask changes nothing in, which is nearly all: it takes 20 times as long to say so.
_PLAIN_FRONT = re.compile(
    r"https?://(?!xn--|[^/]*\.xn--)[a-z0-9.-]+(?::[1-9][0-9]{0,3})?"
    r"/(?!/)[A-Za-z0-9._~!$&'()*+,/:;=@-]*"
)
_PLAIN_QUERY = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,/:;=?@-]|%2[0356Bb]|%3[Dd])*")


_CONTROLS = re.compile(r"[\x80-\x9f]")
"""Those that Flask decodes: a terminal may obey them."""


def url_of(scheme: str, host: str, root_path: str, path: str, query: str) -> str:
    """Return the URL of a request with these fields, as Flask's ``request.url`` is.

    It is an IRI: readable characters are decoded, those that mean something else stay encoded, and
    so do all control characters. A port that is the scheme's own is left out.

    Args:
        scheme: As in `UsageRecord`, like all others.
        host: Likewise.
        root_path: Likewise.
        path: Likewise.
        query: Likewise.

    Returns:
        The parts as they are, one after the other, if there is no scheme or host, or no URL of such
        a host.

    Raises:
        TypeError: One is no text.
    """
    try:
        host = host.removesuffix(_USUAL_PORTS.get(scheme, ""))
        front = f"{scheme}://{host}{root_path}{path}"
        url = f"{front}?{query}" if query else front
        if _PLAIN_FRONT.fullmatch(front) and _PLAIN_QUERY.fullmatch(query):
            return url
        if not scheme or not host:
            return url
        url = get_current_url(scheme, host, root_path, path, query.encode())
    except ValueError:
        return url
    except AttributeError as error:
        raise TypeError("a part of the URL is no text") from error
    return _CONTROLS.sub(lambda found: quote(found[0]), url)
