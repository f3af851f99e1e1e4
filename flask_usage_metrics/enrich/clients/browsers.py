"""Browser, version and platform by the marks in a User-Agent header."""

from __future__ import annotations

import re
from typing import NamedTuple

# The first that is found names the browser: nearly all name Chrome or Safari as well, after
# themselves or before. The version is the number behind the mark.
_BROWSERS = (
    ("instagram ", "Instagram"),
    ("fbav/", "Facebook"),
    ("micromessenger/", "WeChat"),
    ("snapchat/", "Snapchat"),
    ("snapchat", "Snapchat"),
    ("musical_ly_", "TikTok"),
    ("bytedancewebview/", "TikTok"),
    (" line/", "LINE"),
    ("kakaotalk ", "KakaoTalk"),
    ("gsa/", "Google App"),
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
    ("arkweb/", "ArkWeb"),
    ("qqbrowser/", "QQ Browser"),
    ("silk/", "Amazon Silk"),
    ("whale/", "Whale"),
    ("oculusbrowser/", "Meta Quest Browser"),
    ("nintendobrowser/", "Nintendo Browser"),
    ("fxios/", "Firefox"),
    ("firefox/", "Firefox"),
    ("crios/", "Chrome"),
)

# Many others are made of these, and not all say so.
_BASES = (("chrome/", "Chrome"), ("chromium/", "Chrome"), ("msie ", "IE"))

_ON_IOS = ("crios/", "fxios/", "edgios/", "opios/", "gsa/")
"""Marks of browsers for iOS, which asked for a site as of a computer say macOS."""

_WEB_VIEW = re.compile(r"; wv\)|version/4\.0 chrome/")

# The first that is found: Windows Phone also says Android, Android also says Linux, iOS also says
# Mac OS X, and HarmonyOS says Android as long as it runs Android's programs.
_PLATFORMS = (
    ("playstation", "PlayStation"),
    ("nintendo", "Nintendo"),
    ("xbox", "Xbox"),
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

_FURTHER = (
    "Android Browser",
    "Android WebView",
    "Brave",
    "Opera",
    "PlayStation Browser",
    "Safari",
    "iOS WebView",
)

BROWSERS = frozenset(name for _, name in (*_BROWSERS, *_BASES)) | frozenset(_FURTHER)
"""Every browser there is; ua-parser's and the client hints' are called by these names."""

PLATFORMS = frozenset(name for _, name in _PLATFORMS)
"""Every platform there is; ua-parser's and the client hints' are called by these names."""

MAJOR = re.compile("[0-9]{1,4}")
"""A major version; longer numbers are none."""


class Sniffed(NamedTuple):
    """What the marks in a User-Agent header say.

    Attributes:
        browser: One of `BROWSERS`; None when unknown.
        version: Its major version; None when unknown.
        platform: One of `PLATFORMS`; None when unknown.
        is_certain: Whether the browser says its own name, and not that of what it is made of.
    """

    browser: str | None
    version: str | None
    platform: str | None
    is_certain: bool = False


def sniff(user_agent: str) -> Sniffed:
    """Return browser, version and platform, by an ordered list of marks.

    How often it is right: see "Enrichment" in tests/benchmarks/README.md.
    """
    lower = user_agent.lower()
    platform = next((name for mark, name in _PLATFORMS if mark in lower), None)
    for mark, browser in _BROWSERS:
        position = lower.find(mark)
        if position >= 0:
            if platform == "macOS" and mark in _ON_IOS:
                platform = "iOS"
            return Sniffed(browser, _number_at(lower, position + len(mark)), platform, True)
    if platform == "PlayStation":
        return Sniffed("PlayStation Browser", None, platform, True)
    for mark, browser in _BASES:
        position = lower.find(mark)
        if position >= 0:
            if mark == "chrome/" and platform == "Android" and _WEB_VIEW.search(lower):
                browser = "Android WebView"
            return Sniffed(browser, _number_at(lower, position + len(mark)), platform)
    if "trident/" in lower:
        return Sniffed("IE", _number_behind(lower, "rv:"), platform)
    if "opera" in lower:
        mark = "version/" if "version/" in lower else "opera/"
        return Sniffed("Opera", _number_behind(lower, mark), platform)
    if "safari/" in lower:
        browser = "Android Browser" if platform == "Android" else "Safari"
        return Sniffed(browser, _number_behind(lower, "version/"), platform)
    if "applewebkit/" in lower and platform == "iOS":
        return Sniffed("iOS WebView", None, platform)
    return Sniffed(None, None, platform)


def _number_at(text: str, position: int) -> str | None:
    number = MAJOR.match(text, position)
    return number[0] if number else None


def _number_behind(text: str, mark: str) -> str | None:
    position = text.find(mark)
    return _number_at(text, position + len(mark)) if position >= 0 else None
