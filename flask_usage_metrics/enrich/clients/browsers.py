"""Browser, version and platform by a User-Agent header, as it says, or as ua-parser does."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from time import sleep
from typing import Any

Parsed = tuple[str | None, str | None, str | None]
"""Browser, its major version, platform; each None when unknown."""

# The first that is found names the browser: nearly all name Chrome or Safari as well, after
# themselves or before. The version is the number behind the mark.
_BROWSERS = (
    ("instagram ", "Instagram"),
    ("fbav/", "Facebook"),
    ("micromessenger/", "WeChat"),
    ("edg/", "Edge"),
    ("edga/", "Edge"),
    ("edgios/", "Edge"),
    ("edge/", "Edge"),
    ("opr/", "Opera"),
    ("opt/", "Opera"),
    ("opx/", "Opera"),
    ("opios/", "Opera"),
    ("opera mini/", "Opera"),
    ("samsungbrowser/", "Samsung Internet"),
    ("yabrowser/", "Yandex Browser"),
    ("ucbrowser/", "UC Browser"),
    ("vivaldi/", "Vivaldi"),
    ("duckduckgo/", "DuckDuckGo"),
    ("ddg/", "DuckDuckGo"),
    ("miuibrowser/", "MIUI Browser"),
    ("huaweibrowser/", "Huawei Browser"),
    ("qqbrowser/", "QQ Browser"),
    ("silk/", "Amazon Silk"),
    ("whale/", "Whale"),
    ("fxios/", "Firefox"),
    ("firefox/", "Firefox"),
    ("crios/", "Chrome"),
    ("chrome/", "Chrome"),
    ("chromium/", "Chrome"),
    ("msie ", "IE"),
)

_WEB_VIEW = re.compile(r"; wv\)|version/4\.0 chrome/")

# The first that is found: Windows Phone also says Android, Android also says Linux, iOS also says
# Mac OS X, and HarmonyOS says Android as long as it runs Android's programs.
_PLATFORMS = (
    ("windows phone", "Windows Phone"),
    ("windows", "Windows"),
    ("kaios", "KaiOS"),
    ("tizen", "Tizen"),
    ("web0s", "webOS"),
    ("webos", "webOS"),
    ("android", "Android"),
    ("harmony", "HarmonyOS"),
    ("cros ", "ChromeOS"),
    ("iphone", "iOS"),
    ("ipad", "iOS"),
    ("ipod", "iOS"),
    ("macintosh", "macOS"),
    ("mac os x", "macOS"),
    ("bb10", "BlackBerry"),
    ("blackberry", "BlackBerry"),
    ("linux", "Linux"),
    ("freebsd", "BSD"),
    ("openbsd", "BSD"),
    ("netbsd", "BSD"),
)

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

BROWSERS = frozenset(name for _, name in _BROWSERS) | frozenset(_FAMILIES.values())
"""Every browser there is; both parsers use these names."""

PLATFORMS = frozenset(name for _, name in _PLATFORMS)
"""Every platform there is; both parsers use these names."""

_MAJOR = re.compile("[0-9]{1,4}")


def sniff(user_agent: str) -> Parsed:
    """Return browser, version and platform, by an ordered list of marks.

    How often it is right: see "Enrichment" in tests/benchmarks/README.md.
    """
    lower = user_agent.lower()
    platform = next((name for mark, name in _PLATFORMS if mark in lower), None)
    for mark, browser in _BROWSERS:
        position = lower.find(mark)
        if position >= 0:
            if mark == "chrome/" and platform == "Android" and _WEB_VIEW.search(lower):
                browser = "Android WebView"
            return browser, _number_at(lower, position + len(mark)), platform
    if "trident/" in lower:
        return "IE", _number_behind(lower, "rv:"), platform
    if "opera" in lower:
        mark = "version/" if "version/" in lower else "opera/"
        return "Opera", _number_behind(lower, mark), platform
    if "safari/" in lower:
        browser = "Android Browser" if platform == "Android" else "Safari"
        return browser, _number_behind(lower, "version/"), platform
    if "applewebkit/" in lower and platform == "iOS":
        return "iOS WebView", None, platform
    return None, None, platform


def consult_ua_parser(user_agent: str) -> Parsed | None:
    """Ask ua-parser for browser, version and platform, in the words of `sniff`.

    Returns:
        None when ua-parser is not installed or fails. What it does not know, or calls by a name
        outside the vocabulary, is as `sniff` finds it.
    """
    ask = _ua_parser()
    if ask is None:
        return None
    try:
        family, major, system = ask(user_agent)
    except Exception:  # noqa: BLE001 - a lone surrogate, say, which Rust has no text for
        return None
    browser = _FAMILIES.get(family or "")
    platform = _SYSTEMS.get(system or "")
    if browser and platform:
        return browser, _major(major), platform
    sniffed = sniff(user_agent)
    if browser:
        return browser, _major(major), sniffed[2]
    return sniffed[0], sniffed[1], platform or sniffed[2]


def _major(version: str | None) -> str | None:
    return version if version and _MAJOR.fullmatch(version) else None


def _number_at(text: str, position: int) -> str | None:
    number = _MAJOR.match(text, position)
    return number[0] if number else None


def _number_behind(text: str, mark: str) -> str | None:
    position = text.find(mark)
    return _number_at(text, position + len(mark)) if position >= 0 else None


# Loaded at first use, by the worker: importing the package stays cheap.


@cache
def _ua_parser() -> Callable[[str], Parsed] | None:
    # Without one of these engines ua-parser falls back on `re`, which is far slower than sniffing.
    if not (importlib.util.find_spec("ua_parser_rs") or importlib.util.find_spec("re2")):
        return None
    try:
        from ua_parser import BestAvailableResolver, Domain, load_lazy_builtins

        # Not `ua_parser.parser`, which also loads the rules for devices: twice the time and memory.
        # Nor does it need a cache, as `describe` has one.
        browsers, systems, _ = load_lazy_builtins()
        rules: Any = (browsers, systems, [])
        if importlib.util.find_spec("ua_parser_rs"):
            rules = tuple(map(_letting_others_run, rules))
        resolve = BestAvailableResolver(rules)
    except Exception:  # noqa: BLE001 - not installed, or broken; the sniffer does as well
        return None

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
