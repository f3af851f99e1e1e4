"""Reads a WSGI environ into the bounded texts of a record."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flask_usage_metrics.records.observation import ENVIRON_KEYS

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

MAX_JSON_BYTES = 65_536
"""View arguments or a ``g.track_var`` that are larger as JSON are left out of the record."""

MAX_ENVIRON_CHARACTERS = 16_384
"""Characters of all texts of one environ together; above, each is cut. Common servers refuse a
request line of more than 8 190."""

_MAX_CUT_CHARACTERS = 2048
"""Characters kept of each text of an environ that is too large."""

_SUBSTITUTES = ("SERVER_NAME", "SERVER_PORT", "HTTP_X_QUEUE_START")
"""Read in place of an empty Host, and of a missing X-Request-Start."""


_HINTS = ("HTTP_SEC_CH_UA", "HTTP_SEC_CH_UA_PLATFORM")
"""Read behind the User-Agent, if the first of them came."""


def environ_texts(environ: WSGIEnvironment, headers: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of `ENVIRON_KEYS`, then those of some headers, as `Observation` has them.

    Args:
        environ: Of the request.
        headers: WSGI names of further headers.

    Returns:
        One text for each, ``""`` if absent; each cut to 2 048 characters if all together have more
        than `MAX_ENVIRON_CHARACTERS`.
    """
    try:
        # Written out, as a loop is slower: see tests/benchmarks/README.md.
        texts: tuple[str, ...] = (
            environ["REQUEST_METHOD"],
            environ["wsgi.url_scheme"],
            environ["HTTP_HOST"] or _server(environ),
            environ["SCRIPT_NAME"],
            environ["PATH_INFO"],
            environ["QUERY_STRING"],
            environ["SERVER_PROTOCOL"],
            environ["REMOTE_ADDR"],
            environ["HTTP_X_FORWARDED_FOR"] if "HTTP_X_FORWARDED_FOR" in environ else "",
            f"{environ['HTTP_USER_AGENT']}\n{environ['HTTP_SEC_CH_UA']}"
            f"\n{environ['HTTP_SEC_CH_UA_PLATFORM']}"
            if "HTTP_SEC_CH_UA" in environ
            else environ["HTTP_USER_AGENT"]
            if "HTTP_USER_AGENT" in environ
            else "",
            environ["HTTP_ACCEPT_LANGUAGE"] if "HTTP_ACCEPT_LANGUAGE" in environ else "",
            environ["HTTP_REFERER"] if "HTTP_REFERER" in environ else "",
            environ["HTTP_X_REQUEST_START"]
            if "HTTP_X_REQUEST_START" in environ
            else environ["HTTP_X_QUEUE_START"]
            if "HTTP_X_QUEUE_START" in environ
            else "",
        )
        if headers:
            texts += tuple([environ.get(name, "") for name in headers])
        # join() raises TypeError if one of them is no text.
        if len("".join(texts)) <= MAX_ENVIRON_CHARACTERS:
            return texts
    except (KeyError, TypeError):
        # PEP 3333 lets a server leave some out; a2wsgi has None for the address of a Unix socket,
        # and middleware may have put a number there.
        wanted = (*ENVIRON_KEYS, *_SUBSTITUTES, *_HINTS, *headers)
        clean = {key: str(environ[key]) for key in wanted if environ.get(key) is not None}
        absent = dict.fromkeys((*ENVIRON_KEYS[:-1], *_HINTS[1:]), "")
        return environ_texts({**absent, **clean}, headers)
    return tuple([text[:_MAX_CUT_CHARACTERS] for text in texts])


def _server(environ: WSGIEnvironment) -> str:
    """Return the host as the server knows it (PEP 3333, URL reconstruction)."""
    name, port = str(environ.get("SERVER_NAME", "")), str(environ.get("SERVER_PORT", ""))
    usual = {"http": "80", "https": "443"}.get(environ["wsgi.url_scheme"])
    return name if port in (usual, "") else f"{name}:{port}"
