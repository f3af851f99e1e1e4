"""Browser, version and platform by ua-parser where it is installed, else by the marks alone."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from time import sleep
from typing import Any

from flask_usage_metrics.enrich.clients.browsers import MAJOR, Sniffed, sniff
from flask_usage_metrics.runtime.passing import is_passing

Parsed = tuple[str | None, str | None, str | None]
"""Family, major version and system, as ua-parser calls them; each None when unknown."""

# What ua-parser calls them. A family that is not here, such as an app's own name, is left to the
# sniffer, so that both have one vocabulary, and a bounded one.
_FAMILIES = {
    "Amazon Silk": "Amazon Silk",
    "Android": "Android Browser",
    "Chrome": "Chrome",
    "Chrome Mobile": "Chrome",
    "Chrome Mobile WebView": "Android WebView",
    "Chrome Mobile iOS": "Chrome",
    "Chromium": "Chrome",
    "DuckDuckGo": "DuckDuckGo",
    "DuckDuckGo Mobile": "DuckDuckGo",
    "Edge": "Edge",
    "Edge Mobile": "Edge",
    "Facebook": "Facebook",
    "Firefox": "Firefox",
    "Firefox Mobile": "Firefox",
    "Firefox iOS": "Firefox",
    "Huawei Browser": "Huawei Browser",
    "IE": "IE",
    "IE Mobile": "IE",
    "Instagram": "Instagram",
    "MiuiBrowser": "MIUI Browser",
    "Mobile Safari": "Safari",
    "Mobile Safari UI/WKWebView": "iOS WebView",
    "Opera": "Opera",
    "Opera GX": "Opera",
    "Opera Mini": "Opera",
    "Opera Mobile": "Opera",
    "Opera Touch": "Opera",
    "QQ Browser": "QQ Browser",
    "QQ Browser Mobile": "QQ Browser",
    "Safari": "Safari",
    "Samsung Internet": "Samsung Internet",
    "UC Browser": "UC Browser",
    "Vivaldi": "Vivaldi",
    "WeChat Browser": "WeChat",
    "Whale": "Whale",
    "Yandex Browser": "Yandex Browser",
}

_CERTAIN = ("iOS", "PlayStation", "Nintendo", "Xbox")
"""Platforms by a mark that ua-parser may take for another, or for none."""

_SYSTEMS = {
    "Android": "Android",
    "BlackBerry OS": "BlackBerry",
    "Chrome OS": "ChromeOS",
    "Debian": "Linux",
    "Fedora": "Linux",
    "FreeBSD": "BSD",
    "KaiOS": "KaiOS",
    "Linux": "Linux",
    "Mac OS X": "macOS",
    "NetBSD": "BSD",
    "OpenBSD": "BSD",
    "Tizen": "Tizen",
    "Ubuntu": "Linux",
    "Windows": "Windows",
    "Windows Phone": "Windows Phone",
    "iOS": "iOS",
    "webOS": "webOS",
}


def parse(user_agent: str) -> Sniffed:
    """Return what `sniff` does, made better by ua-parser if that is installed.

    Where the header names the browser itself the marks decide: ua-parser knows fewer apps, and
    takes some for what they are made of. What it calls by a name outside the vocabulary is as
    `sniff` finds it.

    Raises:
        OSError: ua-parser cannot be loaded now; the next call tries again.
        MemoryError: Likewise.
    """
    sniffed = sniff(user_agent)
    ask = _ua_parser()
    if ask is None:
        return sniffed
    try:
        family, major, system = ask(user_agent)
    except Exception:  # noqa: BLE001 - a lone surrogate, say, which Rust has no text for
        return sniffed
    browser, version, platform, is_certain = sniffed
    if platform not in _CERTAIN:
        platform = _SYSTEMS.get(system or "") or platform
    known = None if is_certain else _FAMILIES.get(family or "")
    # It takes web views of other systems for Android's.
    if known and (known != "Android WebView" or platform == "Android"):
        browser, version = known, _major(major)
    return Sniffed(browser, version, platform, is_certain)


def load() -> None:
    """Load ua-parser's rules if it is installed, once a process; without it the first `parse` does.

    Raises:
        OSError: There are too few open files, say; the next call tries again.
        MemoryError: Likewise.
    """
    _ua_parser()


def _major(version: str | None) -> str | None:
    return version if version and MAJOR.fullmatch(version) else None


# Loaded when an app is set up, not when the package is imported: that stays cheap.


@cache
def _ua_parser() -> Callable[[str], Parsed] | None:
    # Without one of these engines ua-parser falls back on `re`, which is far slower than sniffing.
    engines = ("ua_parser_rs", "re2")
    try:
        engine = next(filter(importlib.util.find_spec, engines), None)
        if engine is None:
            return None
        importlib.import_module(engine)  # it also falls back if that fails
        from ua_parser import BestAvailableResolver, Domain, load_lazy_builtins

        # Not `ua_parser.parser`, which also loads the rules for devices: twice the time and memory.
        # Nor does it need a cache, as `describe` has one.
        browsers, systems, _ = load_lazy_builtins()
        rules: Any = (browsers, systems, [])
        if engine == "ua_parser_rs":
            rules = tuple(map(_letting_others_run, rules))
        resolve = BestAvailableResolver(rules)
    except Exception as error:
        if is_passing(error):  # not cached: the next one may go well
            raise
        return None  # not installed, or broken; the sniffer does as well

    def ask(user_agent: str) -> Parsed:
        found = resolve(user_agent, Domain.USER_AGENT | Domain.OS)
        browser, system = found.user_agent, found.os
        return (
            browser.family if browser else None,
            browser.major if browser else None,
            system.family if system else None,
        )

    return ask


def _letting_others_run(rules: Sequence[Any]) -> Iterator[Any]:
    # The engine holds the interpreter while it takes all rules from a list, and visitors wait.
    for rule in rules:
        sleep(0)
        yield rule
