"""A User-Agent tells browser, version, platform and kind; Accept-Language the first choice."""

import importlib.util
import re
from pathlib import Path

import pytest
from helpers.process import run_python
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.enrich.clients import Client, describe, kinds, language, parser
from flask_usage_metrics.enrich.clients.browsers import BROWSERS, PLATFORMS, Sniffed, sniff
from flask_usage_metrics.enrich.clients.kinds import KINDS, kind_of, named_kinds
from flask_usage_metrics.enrich.clients.parser import parse

needs_ua_parser = pytest.mark.skipif(
    importlib.util.find_spec("ua_parser_rs") is None, reason="the extra [ua] is not installed"
)

WINDOWS = "Mozilla/5.0 (Windows NT 10.0; Win64; x64)"
MAC = "Mozilla/5.0 (Macintosh; Intel Mac OS X 10_15_7)"
IPHONE = "Mozilla/5.0 (iPhone; CPU iPhone OS 17_5 like Mac OS X) AppleWebKit/605.1.15"
LIKE_GECKO = "(KHTML, like Gecko)"
WEBKIT = f"AppleWebKit/537.36 {LIKE_GECKO}"

# Browser, major version, platform; as people's browsers send them.
BROWSER_HEADERS = {
    f"{WINDOWS} {WEBKIT} Chrome/126.0.0.0 Safari/537.36": ("Chrome", "126", "Windows"),
    f"{MAC} {WEBKIT} Chrome/126.0.0.0 Safari/537.36": ("Chrome", "126", "macOS"),
    f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} Chrome/125.0.0.0 Safari/537.36": (
        "Chrome",
        "125",
        "Linux",
    ),
    f"Mozilla/5.0 (X11; CrOS x86_64 14541.0.0) {WEBKIT} Chrome/126.0.0.0 Safari/537.36": (
        "Chrome",
        "126",
        "ChromeOS",
    ),
    f"Mozilla/5.0 (Linux; Android 10; K) {WEBKIT} Chrome/126.0.0.0 Mobile Safari/537.36": (
        "Chrome",
        "126",
        "Android",
    ),
    f"{IPHONE} {LIKE_GECKO} CriOS/126.0.6478.54 Mobile/15E148 Safari/604.1": (
        "Chrome",
        "126",
        "iOS",
    ),
    f"{MAC} AppleWebKit/605.1.15 {LIKE_GECKO} Version/17.5 Safari/605.1.15": (
        "Safari",
        "17",
        "macOS",
    ),
    f"{IPHONE} {LIKE_GECKO} Version/17.5 Mobile/15E148 Safari/604.1": ("Safari", "17", "iOS"),
    "Mozilla/5.0 (iPad; CPU OS 12_5_7 like Mac OS X) AppleWebKit/605.1.15 "
    f"{LIKE_GECKO} Version/12.1.2 Mobile/15E148 Safari/604.1": ("Safari", "12", "iOS"),
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64; rv:127.0) Gecko/20100101 Firefox/127.0": (
        "Firefox",
        "127",
        "Windows",
    ),
    "Mozilla/5.0 (X11; Ubuntu; Linux x86_64; rv:127.0) Gecko/20100101 Firefox/127.0": (
        "Firefox",
        "127",
        "Linux",
    ),
    "Mozilla/5.0 (X11; FreeBSD amd64; rv:122.0) Gecko/20100101 Firefox/122.0": (
        "Firefox",
        "122",
        "BSD",
    ),
    "Mozilla/5.0 (Android 14; Mobile; rv:127.0) Gecko/127.0 Firefox/127.0": (
        "Firefox",
        "127",
        "Android",
    ),
    f"{IPHONE} {LIKE_GECKO} FxiOS/127.0 Mobile/15E148 Safari/605.1.15": ("Firefox", "127", "iOS"),
    f"{WINDOWS} {WEBKIT} Chrome/126.0.0.0 Safari/537.36 Edg/126.0.2592.56": (
        "Edge",
        "126",
        "Windows",
    ),
    f"{WINDOWS} {WEBKIT} Chrome/64.0.3282.140 Safari/537.36 Edge/18.17763": (
        "Edge",
        "18",
        "Windows",
    ),
    f"Mozilla/5.0 (Linux; Android 10; HD1913) {WEBKIT} Chrome/125.0.6422.165 Mobile Safari/537.36 "
    "EdgA/125.0.2535.60": ("Edge", "125", "Android"),
    f"{WINDOWS} {WEBKIT} Chrome/124.0.0.0 Safari/537.36 OPR/110.0.0.0": (
        "Opera",
        "110",
        "Windows",
    ),
    "Opera/9.80 (Windows NT 6.1; WOW64) Presto/2.12.388 Version/12.18": ("Opera", "12", "Windows"),
    "Opera/9.80 (Android; Opera Mini/36.2.2254/119.132; U; id) Presto/2.12.423 Version/12.16": (
        "Opera",
        "36",
        "Android",
    ),
    "Mozilla/5.0 (Linux; Android 13; SAMSUNG SM-S918B) "
    f"{WEBKIT} SamsungBrowser/25.0 Chrome/121.0.0.0 Mobile Safari/537.36": (
        "Samsung Internet",
        "25",
        "Android",
    ),
    f"{WINDOWS} {WEBKIT} Chrome/122.0.0.0 YaBrowser/24.4.0.0 Safari/537.36": (
        "Yandex Browser",
        "24",
        "Windows",
    ),
    "Mozilla/5.0 (Linux; U; Android 11; en-US; M2004J19C) "
    f"{WEBKIT} Version/4.0 Chrome/100.0.4896.58 UCBrowser/13.8.0.1321 Mobile Safari/537.36": (
        "UC Browser",
        "13",
        "Android",
    ),
    f"{WINDOWS} {WEBKIT} Chrome/124.0.0.0 Safari/537.36 Vivaldi/6.7.3329.17": (
        "Vivaldi",
        "6",
        "Windows",
    ),
    f"{MAC} AppleWebKit/605.1.15 {LIKE_GECKO} Version/17.4 Safari/605.1.15 Ddg/17.4": (
        "DuckDuckGo",
        "17",
        "macOS",
    ),
    "Mozilla/5.0 (Linux; U; Android 13; zh-cn; 2211133C Build/TKQ1) "
    f"{WEBKIT} Version/4.0 Chrome/109.0.5414.118 Mobile Safari/537.36 "
    "XiaoMi/MiuiBrowser/17.8.120": ("MIUI Browser", "17", "Android"),
    f"Mozilla/5.0 (Linux; Android 12; HarmonyOS; NOH-AN00; HMSCore 6.13.0.302) {WEBKIT} "
    "Chrome/99.0.4844.88 HuaweiBrowser/14.0.5.302 Mobile Safari/537.36": (
        "Huawei Browser",
        "14",
        "Android",
    ),
    "Mozilla/5.0 (Linux; Android 13; SM-A536B Build/TP1A.220624.014; wv) "
    f"{WEBKIT} Version/4.0 Chrome/125.0.6422.165 Mobile Safari/537.36": (
        "Android WebView",
        "125",
        "Android",
    ),
    f"{IPHONE} {LIKE_GECKO} Mobile/15E148": ("iOS WebView", None, "iOS"),
    "Mozilla/5.0 (Linux; U; Android 4.0.3; ko-kr; LG-L160L Build/IML74K) AppleWebkit/534.30 "
    f"{LIKE_GECKO} Version/4.0 Mobile Safari/534.30": ("Android Browser", "4", "Android"),
    "Mozilla/5.0 (Windows NT 6.1; WOW64; Trident/7.0; rv:11.0) like Gecko": (
        "IE",
        "11",
        "Windows",
    ),
    "Mozilla/5.0 (compatible; MSIE 10.0; Windows NT 6.2; Trident/6.0)": ("IE", "10", "Windows"),
    "Mozilla/5.0 (compatible; MSIE 10.0; Windows Phone 8.0; Trident/6.0; IEMobile/10.0; ARM; "
    "Touch; NOKIA; Lumia 920)": ("IE", "10", "Windows Phone"),
    "Mozilla/5.0 (SMART-TV; Linux; Tizen 5.0) AppleWebKit/537.36 "
    f"{LIKE_GECKO} SamsungBrowser/2.2 Chrome/63.0.3239.84 TV Safari/537.36": (
        "Samsung Internet",
        "2",
        "Tizen",
    ),
    f"{IPHONE} {LIKE_GECKO} Mobile/15E148 [FBAN/FBIOS;FBAV/446.0.0.45.110;FBDV/iPhone14,5]": (
        "Facebook",
        "446",
        "iOS",
    ),
    f"{IPHONE} {LIKE_GECKO} Mobile/21F79 Instagram 334.0.4.32.98 (iPhone14,5; iOS 17_5)": (
        "Instagram",
        "334",
        "iOS",
    ),
}

# What no browser's parser has to agree on, and is a person all the same.
OTHER_PEOPLE = [
    "Dalvik/2.1.0 (Linux; U; Android 13; Pixel 7 Build/TQ3A.230805.001)",
    "Shop/5.2 (com.example.shop; build:52; Android 14; Pixel 8) okhttp/4.12.0",
    "Shop/5 CFNetwork/1494.0.7 Darwin/23.4.0",
    f"{IPHONE} {LIKE_GECKO} Mobile/15E148 [Pinterest/iOS]",
    f"{WINDOWS} {WEBKIT} Slack/4.38.125 Chrome/124.0.6367.243 Electron/30.1.0 Safari/537.36",
    f"Mozilla/5.0 (Phone; OpenHarmony 5.0) {WEBKIT} Chrome/114.0.0.0 Safari/537.36 ArkWeb/4.1",
    f"Mozilla/5.0 (Linux; Android 9; CUBOT_X19) {WEBKIT} Chrome/88.0.4324.93 Mobile Safari/537.36",
]

BOT_HEADERS = {
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)": "search-bot",
    "Mozilla/5.0 (Linux; Android 6.0.1; Nexus 5X Build/MMB29P) AppleWebKit/537.36 (KHTML, like "
    "Gecko) Chrome/126.0.6478.61 Mobile Safari/537.36 (compatible; Googlebot/2.1; "
    "+http://www.google.com/bot.html)": "search-bot",
    "Googlebot-Image/1.0": "search-bot",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; bingbot/2.0; "
    "+http://www.bing.com/bingbot.htm) Chrome/116.0.1938.76 Safari/537.36": "search-bot",
    "Mozilla/5.0 (compatible; YandexBot/3.0; +http://yandex.com/bots)": "search-bot",
    "Mozilla/5.0 (compatible; Baiduspider/2.0; +http://www.baidu.com/search/spider.html)": (
        "search-bot"
    ),
    f"{MAC} AppleWebKit/605.1.15 {LIKE_GECKO} Version/17.4 Safari/605.1.15 (Applebot/0.1; "
    "+http://www.apple.com/go/applebot)": "search-bot",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; GPTBot/1.2; "
    "+https://openai.com/gptbot)": "ai-training",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; ClaudeBot/1.0; "
    "+claudebot@anthropic.com)": "ai-training",
    "CCBot/2.0 (https://commoncrawl.org/faq/)": "ai-training",
    "Mozilla/5.0 (Linux; Android 5.0) AppleWebKit/537.36 (KHTML, like Gecko) Mobile "
    "Safari/537.36 (compatible; Bytespider; spider-feedback@bytedance.com)": "ai-training",
    "meta-externalagent/1.1 (+https://developers.facebook.com/docs/sharing/webmasters/crawler)": (
        "ai-training"
    ),
    "Mozilla/5.0 (compatible; GoogleOther)": "ai-training",
    "Applebot-Extended/0.1": "ai-training",
    f"Mozilla/5.0 {WEBKIT}; compatible; OAI-SearchBot/1.0; +https://openai.com/searchbot": (
        "ai-search"
    ),
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; PerplexityBot/1.0; "
    "+https://perplexity.ai/perplexitybot)": "ai-search",
    "DuckAssistBot/1.2; (+http://duckduckgo.com/duckassistbot.html)": "ai-search",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko); compatible; ChatGPT-User/1.0; "
    "+https://openai.com/bot": "ai-agent",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; Claude-User/1.0) "
    "Chrome/126.0.0.0 Safari/537.36": "ai-agent",
    "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible; MistralAI-User/1.0; "
    "+https://docs.mistral.ai/robots)": "ai-agent",
    "facebookexternalhit/1.1 (+http://www.facebook.com/externalhit_uatext.php)": "preview",
    "Slackbot-LinkExpanding 1.0 (+https://api.slack.com/robots)": "preview",
    "WhatsApp/2.23.20.0 A": "preview",
    "TelegramBot (like TwitterBot)": "preview",
    "http.rb/5.1.1 (Mastodon/4.2.9; +https://mastodon.social/) Bot": "preview",
    "Feedly/1.0 (+http://www.feedly.com/fetcher.html; 16 subscribers; like FeedFetcher-Google)": (
        "feed"
    ),
    "Tiny Tiny RSS/21.05 (http://tt-rss.org/)": "feed",
    "Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)": "monitor",
    "kube-probe/1.29": "monitor",
    "ELB-HealthChecker/2.0": "monitor",
    "updown.io daemon 2.11": "monitor",
    "curl/8.7.1": "script",
    "Wget/1.21.4": "script",
    "python-requests/2.32.3": "script",
    "Python/3.12 aiohttp/3.9.5": "script",
    "Go-http-client/2.0": "script",
    "okhttp/4.12.0": "script",
    "Java/17.0.11": "script",
    "PostmanRuntime/7.39.0": "script",
    "Werkzeug/3.0.3": "script",
    f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} HeadlessChrome/126.0.0.0 Safari/537.36": "other-bot",
    "Mozilla/5.0 (compatible; AhrefsBot/7.0; +http://ahrefs.com/robot/)": "other-bot",
    "Sora 1.0": "other-bot",
    "Mozilla/5.0": "other-bot",
    "x": "other-bot",
}

PATTERNS = [
    line
    for line in (Path(kinds.__file__).parent / "bots.txt").read_text("ascii").splitlines()
    if not line.startswith("#")
]

ANY_TEXT = st.one_of(
    st.text(st.characters(), max_size=600),  # includes NUL and lone surrogates
    st.lists(
        st.sampled_from(
            sorted({word for text in (*BROWSER_HEADERS, *BOT_HEADERS) for word in text.split()})
        ),
        max_size=40,
    ).map(" ".join),
)


def ids(text):
    return text[-40:] if isinstance(text, str) else None


@pytest.mark.parametrize(("header", "expected"), BROWSER_HEADERS.items(), ids=ids)
def test_the_sniffer_knows_the_browsers_people_use(header, expected):
    assert sniff(header)[:3] == expected


@needs_ua_parser
@pytest.mark.parametrize(("header", "expected"), BROWSER_HEADERS.items(), ids=ids)
def test_ua_parser_answers_in_the_same_words(header, expected):
    assert parse(header)[:3] == expected


# Kind, browser, version, platform, source, header.
REAL = [
    tuple(None if value == "-" else value for value in line.split("\t"))
    for line in (Path(__file__).parent / "user_agents.tsv").read_text("ascii").splitlines()
    if not line.startswith("#")
]


def test_real_headers_are_many_and_of_every_kind():
    assert len({header for *_, header in REAL}) == len(REAL) >= 300
    assert {kind for kind, *_ in REAL} == set(KINDS)


@pytest.mark.parametrize("tell", [sniff, pytest.param(parse, marks=needs_ua_parser)])
def test_real_headers_are_told(tell):
    wrong = []
    for kind, browser, version, platform, _, header in REAL:
        told = tell(header)[:3] if kind == "human" else (None, None, None)
        if (kind_of(header), *told) != (kind, browser, version, platform):
            wrong.append((header, kind_of(header), told))
    assert wrong == []


def test_real_headers_are_described():
    wrong = [
        header
        for kind, browser, version, platform, _, header in REAL
        if describe(header) != Client(browser, version, platform, kind)
    ]
    assert wrong == []


BRANDS = '"Chromium";v="142", "{brand}";v="{version}", "Not_A Brand";v="99"'
WINDOWS_CHROME = f"{WINDOWS} {WEBKIT} Chrome/142.0.0.0 Safari/537.36"
DESKTOP_SITE = f"Mozilla/5.0 (X11; Linux x86_64) {WEBKIT} Chrome/142.0.0.0 Safari/537.36"


@pytest.mark.parametrize(
    ("header", "brands", "platform", "expected"),
    [
        pytest.param(
            WINDOWS_CHROME,
            BRANDS.format(brand="Google Chrome", version="142"),
            '"Windows"',
            ("Chrome", "142", "Windows"),
            id="Chrome",
        ),
        pytest.param(
            WINDOWS_CHROME,
            BRANDS.format(brand="Brave", version="142"),
            '"Windows"',
            ("Brave", "142", "Windows"),
            id="Brave",
        ),
        pytest.param(
            WINDOWS_CHROME,
            BRANDS.format(brand="Opera GX", version="123"),
            "",
            ("Opera", "123", "Windows"),
            id="Opera in disguise",
        ),
        pytest.param(
            DESKTOP_SITE,
            BRANDS.format(brand="Google Chrome", version="142"),
            '"Android"',
            ("Chrome", "142", "Android"),
            id="desktop site on a phone",
        ),
        pytest.param(
            f"Mozilla/5.0 (Web0S; Linux/SmartTV) {WEBKIT} Chrome/120.0.0.0 Safari/537.36",
            '"Chromium";v="120"',
            '"Linux"',
            ("Chrome", "120", "webOS"),
            id="television",
        ),
        pytest.param(
            f"{WINDOWS_CHROME} Edg/142.0.0.0",
            BRANDS.format(brand="Brave", version="1"),
            '"Nonsense"',
            ("Edge", "142", "Windows"),
            id="its own name holds",
        ),
        pytest.param(
            WINDOWS_CHROME,
            '"Brave";v="12345678901"\\"; x, "";v="", Brave;v=1' + ";" * 9000,
            '"' * 9000,
            ("Brave", "1234", "Windows"),
            id="malformed",
        ),
    ],
)
def test_client_hints_tell_what_the_header_hides(header, brands, platform, expected):
    assert describe(header, brands, platform) == Client(*expected, "human")


def test_a_browser_that_a_program_drives_is_told_by_its_hints():
    hints = BRANDS.format(brand="HeadlessChrome", version="142")
    assert describe(WINDOWS_CHROME, hints, '"Linux"') == Client(None, None, None, "other-bot")
    assert describe("curl/8", hints).kind == "script"


@pytest.mark.parametrize("header", [*BROWSER_HEADERS, *OTHER_PEOPLE], ids=ids)
def test_a_person_is_human(header):
    assert kind_of(header) == "human"
    assert describe(header).kind == "human"


@pytest.mark.parametrize(("header", "kind"), BOT_HEADERS.items(), ids=ids)
def test_a_bot_is_of_its_kind_and_of_no_browser(header, kind):
    assert describe(header) == Client(None, None, None, kind)


@pytest.mark.parametrize("header", [None, "", "  ", "\t"])
def test_who_says_nothing_is_a_bot(header):
    assert describe(header) == Client(None, None, None, "other-bot")


def test_a_name_is_found_as_a_whole_word_only():
    assert kind_of("Mozilla/5.0 (compatible; GPTBot) x") == "ai-training"
    assert kind_of(f"{MAC} {WEBKIT} Chrome/126.0.0.0 Safari/537.36 (xdevin)") == "human"


def test_of_two_names_the_purpose_outranks_the_tool():
    assert kind_of("python-requests/2.32 (compatible; Feedbin)") == "feed"
    assert kind_of("curl/8 (like Googlebot) GPTBot/1.0") == "ai-training"


@needs_ua_parser
def test_people_are_described_by_ua_parser_where_it_is_installed(monkeypatch):
    header = f"{WINDOWS} {WEBKIT} Chrome/126.0.0.0 Safari/537.36 told/apart"
    monkeypatch.setattr(
        "flask_usage_metrics.enrich.clients.parser.sniff",
        lambda user_agent: Sniffed("Opera", "1", "Linux"),
    )
    assert describe(header) == Client("Chrome", "126", "Windows", "human")


def fail(user_agent):
    raise RuntimeError


@pytest.mark.parametrize("ask", [None, fail], ids=["not installed", "failing"])
def test_without_ua_parser_people_are_described_by_the_sniffer(monkeypatch, ask):
    header = f"{WINDOWS} {WEBKIT} Chrome/126.0.0.0 Safari/537.36 {ask}"
    monkeypatch.setattr(parser, "_ua_parser", lambda: ask)
    assert parse(header) == sniff(header)
    assert describe(header) == Client("Chrome", "126", "Windows", "human")


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        pytest.param(("MyApp", "7", "Android"), ("Chrome", "126", "Android"), id="browser"),
        pytest.param(("Firefox", "99", "Haiku"), ("Firefox", "99", "Windows"), id="platform"),
        pytest.param((None, None, None), ("Chrome", "126", "Windows"), id="both"),
        pytest.param(
            ("Chrome Mobile WebView", "9", "iOS"), ("Chrome", "126", "iOS"), id="web view"
        ),
        pytest.param(("Safari", "5a", "iOS"), ("Safari", None, "iOS"), id="version"),
        pytest.param(("Safari", "12345", "iOS"), ("Safari", None, "iOS"), id="long version"),
    ],
)
def test_what_ua_parser_calls_by_another_name_is_left_to_the_sniffer(monkeypatch, answer, expected):
    monkeypatch.setattr(parser, "_ua_parser", lambda: lambda user_agent: answer)
    header = f"{WINDOWS} {WEBKIT} Chrome/126.0.0.0 Safari/537.36"
    assert parse(header) == Sniffed(*expected)
    assert parse(f"{header} Edg/126.0.0.0")[:2] == ("Edge", "126")


@given(ANY_TEXT, ANY_TEXT, ANY_TEXT)
def test_describing_never_raises_and_stays_in_the_vocabulary(header, brands, platform):
    found = describe(header, brands, platform)
    assert found.kind in KINDS
    told = (found.browser, found.version, found.platform)
    for browser, version, platform in (sniff(header)[:3], parse(header)[:3], told):
        assert browser is None or browser in BROWSERS
        assert version is None or re.fullmatch("[0-9]{1,4}", version)
        assert platform is None or platform in PLATFORMS


@pytest.mark.parametrize("header", ["\0", "\ud800", "\ud800 Chrome/1", "İ" * 1000, "(" * 9_000_000])
def test_odd_text_is_described(header):
    assert describe(header).kind in KINDS


def test_of_a_long_header_the_first_512_characters_count():
    person = f"{WINDOWS} {WEBKIT} Chrome/126.0.0.0 Safari/537.36"
    assert describe(person + " " * 512 + "Googlebot/2.1").kind == "human"
    assert describe(person + " " * 100 + "Googlebot/2.1").kind == "search-bot"


def test_the_kinds_are_those_of_the_record():
    assert set(KINDS) == {
        "human",
        "search-bot",
        "ai-training",
        "ai-search",
        "ai-agent",
        "preview",
        "feed",
        "monitor",
        "script",
        "other-bot",
    }


NAMES = [
    line
    for line in (Path(kinds.__file__).parent / "names.txt").read_text("ascii").splitlines()
    if line and not line.startswith("#")
]


def test_every_name_belongs_to_one_kind_and_has_a_source():
    assert [line[1:-1] for line in NAMES if line.startswith("[")] == list(KINDS[1:-1])
    names = [line for line in NAMES if not line.startswith("[")]
    assert [name for name in names if not re.fullmatch(r"[^\tA-Z]+\t(a?c?|o)(?<!\t)", name)] == []
    assert len({name.partition("\t")[0].lstrip("^") for name in names}) == len(names) > 600


def test_a_name_is_recognised_by_itself():
    wrong = {}
    for name, kind in named_kinds().items():
        found = kind_of(f"{name.lstrip('^').upper()}/1.0 (+https://bot.example)")
        if found != kind:
            wrong[name] = f"{found}, not {kind}"
    assert not wrong


def is_bot_by_one_pattern_after_the_other(lower):
    return any(re.search(pattern, lower, re.IGNORECASE | re.ASCII) for pattern in PATTERNS)


def test_the_list_is_whole():
    assert len(PATTERNS) == 206


def test_the_fast_form_of_the_patterns_gives_their_verdict():
    headers = [*BROWSER_HEADERS, *BOT_HEADERS, *PATTERNS]
    lowered = [header.lower().replace("okhttp", "") for header in headers]
    assert [
        lower
        for lower in lowered
        if kinds._looks_like_a_bot(lower) != is_bot_by_one_pattern_after_the_other(lower)
    ] == []


@given(st.lists(st.sampled_from([re.sub(r"[\\^$()|?]|\[.*", "", p) for p in PATTERNS]), max_size=3))
def test_the_fast_form_gives_the_verdict_of_mixtures(parts):
    lower = "mozilla/5.0 (x; y) " + " ".join(parts).replace("okhttp", "")
    assert kinds._looks_like_a_bot(lower) == is_bot_by_one_pattern_after_the_other(lower)


def test_importing_reads_no_rules():
    code = (
        "import sys, flask_usage_metrics.enrich.clients.kinds as c;"
        "print('ua_parser' in sys.modules, c._bot_patterns.cache_info().currsize)"
    )
    assert run_python(code) == (0, "False 0\n", "")


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        pytest.param("en-US,en;q=0.9", "en-US", id="browser"),
        pytest.param("de", "de", id="one"),
        pytest.param("en;q=0.5, de;q=0.8", "de", id="highest"),
        pytest.param("fr;q=0.8, de;q=0.8", "fr", id="first of equals"),
        pytest.param("EN-us", "en-US", id="case"),
        pytest.param("en_US", "en-US", id="underscore"),
        pytest.param("zh-hant-tw", "zh-Hant-TW", id="script and region"),
        pytest.param("sr-latn", "sr-Latn", id="script"),
        pytest.param("es-419", "es-419", id="region by number"),
        pytest.param("fil-PH", "fil-PH", id="three letters"),
        pytest.param("de-DE-1996-x-private", "de-DE", id="variant"),
        pytest.param("en;q=0, de;q=0.1", "de", id="not acceptable"),
        pytest.param("en;q=0", None, id="nothing acceptable"),
        pytest.param("en;q=x, de;q=0.1", "de", id="malformed weight"),
        pytest.param("en;q=2, de;q=0.1", "de", id="weight out of range"),
        pytest.param("en;q=-1", None, id="negative weight"),
        pytest.param("en; Q = 0.3 , de;q=.2", "en", id="blanks"),
        pytest.param("en;level=1;q=0.2, de;q=0.3", "de", id="other parameter"),
        pytest.param("*", None, id="any"),
        pytest.param("*, de;q=0.5", "de", id="any, else one"),
        pytest.param("", None, id="empty"),
        pytest.param(None, None, id="absent"),
        pytest.param("english please", None, id="prose"),
        pytest.param("e", None, id="one letter"),
        pytest.param("d\u00e9", None, id="not ASCII"),
        pytest.param("../../etc/passwd", None, id="path"),
    ],
)
def test_the_language_is_the_first_choice(header, expected):
    assert language(header) == expected


def test_a_choice_cut_by_the_bound_is_none():
    assert language("en;q=0.1," + " " * 186 + "de-CH;q=0.9") == "en"
    assert language("en;q=0.1," + " " * 180 + "de-CH;q=0.9") == "de-CH"
    assert language("x" * 5_000_000) is None


@given(st.one_of(st.text(st.characters(), max_size=300), st.text("aZ-_;,q=01.* ", max_size=300)))
def test_a_language_never_raises_and_is_a_short_tag(header):
    found = language(header)
    assert found is None or re.fullmatch("[a-z]{2,3}(-[A-Z][a-z]{3})?(-[A-Z]{2}|-[0-9]{3})?", found)
