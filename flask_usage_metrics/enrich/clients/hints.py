"""Client hints (Sec-CH-UA, Sec-CH-UA-Platform) -> the browser and platform a User-Agent hides."""

from __future__ import annotations

import re

from flask_usage_metrics.enrich.clients.browsers import Sniffed

_BRAND = re.compile(r'"([^"]{1,64})";\s*v="([0-9]{1,4})')

# Brands that User-Agent headers of Chrome's kind do not tell, or tell otherwise. What is not here
# is Chromium, or made up, as one brand of each list is (GREASE).
_BRANDS = {
    "amazon silk": "Amazon Silk",
    "android webview": "Android WebView",
    "brave": "Brave",
    "duckduckgo": "DuckDuckGo",
    "huaweibrowser": "Huawei Browser",
    "microsoft edge": "Edge",
    "microsoft edge webview2": "Edge",
    "oculus browser": "Meta Quest Browser",
    "opera": "Opera",
    "opera gx": "Opera",
    "samsung internet": "Samsung Internet",
    "vivaldi": "Vivaldi",
    "whale": "Whale",
    "yabrowser": "Yandex Browser",
    "yandex": "Yandex Browser",
}

_HEADLESS = "headlesschrome"

_PLATFORMS = {
    "android": "Android",
    "chrome os": "ChromeOS",
    "chromium os": "ChromeOS",
    "harmonyos": "HarmonyOS",
    "linux": "Linux",
    "macos": "macOS",
    "windows": "Windows",
}

_COMPUTERS = ("Windows", "macOS", "Linux", None)
"""What the User-Agent header of a phone says that asks for a site as of a computer."""


def is_headless(brands: str) -> bool:
    """Tell whether a program drives the browser, whatever its User-Agent header says.

    Args:
        brands: The Sec-CH-UA header; ``""`` if absent.
    """
    return _HEADLESS in brands.lower()


def improve(sniffed: Sniffed, brands: str, platform: str) -> Sniffed:
    """Return what is known of a browser with what its client hints tell.

    Args:
        sniffed: By its User-Agent header. A browser that says its own name there keeps it.
        brands: The Sec-CH-UA header; ``""`` if absent.
        platform: The Sec-CH-UA-Platform header; ``""`` if absent.
    """
    if not sniffed.is_certain:
        for brand, version in _BRAND.findall(brands):
            if known := _BRANDS.get(brand.lower()):
                sniffed = sniffed._replace(browser=known, version=version)
                break
    hinted = _PLATFORMS.get(platform.strip(' "').lower())
    # Televisions and the like say "Linux" here.
    if hinted and sniffed.platform in _COMPUTERS and (hinted != "Linux" or not sniffed.platform):
        sniffed = sniffed._replace(platform=hinted)
    return sniffed
