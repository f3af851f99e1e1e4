"""A secret is found by the structure around it, wherever in a request it stands."""

from __future__ import annotations

import base64
import logging
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
from flask import g, request
from helpers.examples import examples
from helpers.front_door import Site
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

Make = Callable[..., Site]

CANARY = "s3cr3t"
"""Neither long nor random: nothing but its place tells that it is secret."""

ALL = quote(f"https://ann:{CANARY}@shop.example/x", "")
NAMES = (
    *("pw", "cookie", "PHPSESSID", "totp", "ticket", "hmac", "card", "cvv", "iban", "ssn", "otp"),
    *("password", "access_token", "api-key", "X-Amz-Signature", "SAMLResponse", "user%5Bpin%5D"),
)

TARGETS = [
    *(f"/?{name}={CANARY}" for name in NAMES),
    *(f"/a;{name}={CANARY}/b" for name in NAMES),
    f"/login%3Fpassword={CANARY}",
    f"/login%3Fa=1&password={CANARY}/{CANARY}",
    f"/login%253Fpassword%253D{CANARY}",
    f"/login%25253Fpassword%25253D{CANARY}/{CANARY}",
    f"/a;token={CANARY}",
    f"/a;v=1;token={CANARY};w=2/b",
    f"/a%3Btoken%3D{CANARY}/b",
    f"/token={CANARY}",
    f"/token={CANARY}/{CANARY}",
    f"/token%3D{CANARY}%2F{CANARY}",
    f"/%74oken={CANARY}",
    f"/p/https://ann:{CANARY}@shop.example/x",
    f"/p/https:/ann:{CANARY}@shop.example/x",
    f"/p/https://{CANARY}@shop.example/x",
    f"/p/https:/{CANARY}@shop.example/x",
    f"/p/https:{CANARY}@shop.example/x",
    f"/p/https%3A%2F%2F{CANARY}@shop.example/x",
    f"/p/redis://{CANARY}@cache/0",
    f"/p/https://shop.example/x/https://{CANARY}@shop.example/x",
    f"/?next=https://shop.example/x/https://{CANARY}@shop.example/x",
    f"/?next=https:{CANARY}@shop.example/x",
    f"/p/https://ann:{CANARY}%2Fx@shop.example/x",
    f"/p/https:%5C%5Cann:{CANARY}@shop.example",
    f"/p/{ALL}",
    f"/p/{quote(ALL, '')}",
    f"/p/{{%22password%22:%22{CANARY}%22}}",
    f"/?next={ALL}",
    f"/?next={quote(ALL, '')}",
    f"/?next={quote(quote(ALL, ''), '')}",
    f"/?next=https://ann:{CANARY}@shop.example/",
    f"/?next=https://{CANARY}@shop.example/",
    f"/?next=//ann:{CANARY}@shop.example/",
    f"/?next=%5C%5Cann:{CANARY}@shop.example/",
    f"/?next=https:%5C%5Cann%3A{CANARY}@shop.example/",
    f"/?next=https:ann:{CANARY}@shop.example/",
    f"/?next=https://ann:{CANARY}%252Fx@shop.example/",
    f"/?dsn=redis://:{CANARY}@cache/0",
    f"/?dsn=ann:{CANARY}@cache",
    f"/?next=%2Fa%3Bsid%3D{CANARY}",
    f"/?next=/a%23access_token={CANARY}",
    f"/?q=a%20password%20=%20{CANARY}",
    f"/?q=%7B'password':'{CANARY}'%7D",
    f"/?q=%7B%5C%22password%5C%22:%5C%22{CANARY}%5C%22%7D",
    f"/?%2570assword={CANARY}",
    f"/?a=1;password={CANARY};b=2",
    f"/?password=x;{CANARY}",
    f"/?password=x;;{CANARY}",
    f"/?password=%26{CANARY}&b=2",
    f"/?x=token%{'25' * 9}3D{CANARY}",
    # Cut right behind the password.
    f"/{'x' * 2036}/ann:{CANARY}@shop.example",
    f"/?{'a=1&' * 1019}b=https://ann:{CANARY}@shop.example",
]

HEADERS = [
    {"Referer": f"https://ann:{CANARY}@shop.example/x"},
    {"Referer": f"https://shop.example\\@ann:{CANARY}@x/"},
    {"Referer": f"https://ann\\:{CANARY}@shop.example/"},
    {"Referer": f"https:\\\\ann:{CANARY}@shop.example/"},
    {"Referer": f"https://shop.example/login%3Fpassword={CANARY}"},
    {"Referer": f"https://shop.example/a;jsessionid={CANARY}"},
    {"Referer": f"https://shop.example/p/{ALL}"},
    {"Referer": f"https://shop.example/p/https://ann:{CANARY}@x/"},
    {"Referer": f"https://shop.example/?password={CANARY}#{CANARY}"},
    {"Referer": f"https://{'x' * 2030}:{CANARY}@shop.example/"},
    {"User-Agent": f"bot/1.0 (+https://ann:{CANARY}@bot.example/)"},
    {"User-Agent": f"bot/1.0 token={CANARY}"},
    {"X-Forwarded-For": f"203.0.113.7;token={CANARY}"},
    {"X-Forwarded-For": f"https://ann:{CANARY}@x"},
    {"Host": f"ann:{CANARY}@shop.example"},
    {"Authorization": "Basic " + base64.b64encode(f"{CANARY}:".encode()).decode()},
    {"Authorization": "Basic " + base64.b64encode(f"ann:{CANARY}".encode()).decode()},
    {"Authorization": f"Bearer {CANARY}"},
    {"Cookie": f"a={CANARY}"},
]


class Outputs:
    """A site, and everything it says of its requests."""

    def __init__(self, make_site: Make, caplog: pytest.LogCaptureFixture, **config: Any) -> None:
        caplog.set_level(logging.DEBUG, logger="flask_usage_metrics")
        self._caplog = caplog
        self._spans = InMemorySpanExporter()
        self._dicts: list[dict[str, Any]] = []
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._spans))
        self.site = make_site(
            self._dicts.append, tracer_provider=provider, FLUSH_SECONDS=0.01, **config
        )

        @self.site.app.route("/v/<path:rest>")
        def view(rest: str) -> str:
            g.track_var.update(asked=request.full_path, back=request.referrer)
            return "x"

    def of(self, path: str, headers: dict[str, str]) -> dict[str, str]:
        """Return all outputs of one request by their names, and forget them."""
        self.site.get(path, headers=headers)
        assert self.site.usage.flush()
        (data,) = self._dicts
        own = [each for each in self._caplog.records if each.name.startswith("flask_usage")]
        outputs = {name: f"{value}" for name, value in data.items()}
        outputs |= {"span": "".join(span.to_json() for span in self._spans.get_finished_spans())}
        outputs |= {"log": "".join(map(logging.Formatter().format, own))}
        outputs |= {"metrics": self.site.scrape()}
        assert outputs["span"]
        self._dicts.clear()
        self._spans.clear()
        self._caplog.clear()
        return outputs


@pytest.mark.parametrize("preset", ["full", "balanced"])
def test_no_output_holds_what_its_place_tells_is_secret(
    make_site: Make, caplog: pytest.LogCaptureFixture, preset: str
) -> None:
    outputs = Outputs(make_site, caplog, PRIVACY=preset, SECRET_KEY="k")
    leaks = []
    for target in TARGETS:
        # Where no route matches, and in the argument of a view.
        for path in (target, f"/v{target}"):
            found = outputs.of(path, {})
            leaks += [(path, name) for name, text in found.items() if CANARY in text]
    for headers in HEADERS:
        for path in ("/", "/v/x"):
            found = outputs.of(path, headers)
            leaks += [(f"{headers}", name) for name, text in found.items() if CANARY in text]
    assert leaks == []
    assert outputs.site.faults() == {}


ORDINARY = [
    "/",
    "/@ann/posts",
    "/maps/@52.37,4.89,15z",
    "/npm/lodash@4.17.21/a.js",
    "/a;v=1;w=2/b",
    "/x=1,y=2/tiles/3",
    "/monkey=1/dashboard=2",
    "/p/https://medium.com/@ann",
    "/p/https://shop.example:8080/a@2x.png",
    "/.well-known/webfinger?resource=acct:ann@shop.example",
    "/?to=mailto:ann@shop.example",
    "/?next=https%3A%2F%2Fshop.example%3A8080%2Fa%3Fb%3D1",
    "/?next=https://medium.com/@ann",
    "/?at=10:30&a=b;c=d;e",
    "/?q=what+is+a+password",
    "/?q=100%25+of+it",
]


@pytest.mark.parametrize("target", ORDINARY)
def test_what_only_looks_similar_stays(make_site: Make, target: str) -> None:
    site = make_site()
    site.get(target)
    record = site.only_record()
    assert "REDACTED" not in record.url
    assert record.query == target.partition("?")[2]


def test_control_characters_are_replaced_in_texts_of_strangers(make_site: Make) -> None:
    site = make_site(TRUSTED_PROXIES=[])
    name = base64.b64encode(b"an\x1b[31mn\n:pw").decode()
    site.get("/a%0Ab%1B%5B2J%7F%C2%85c%00d", headers={"Authorization": f"Basic {name}"})
    record = site.only_record()
    assert record.path == "/a%0Ab%1B[2J%7F%C2%85c%00d"
    assert record.url == "http://localhost/a%0Ab%1B[2J%7F%C2%85c%00d"
    assert record.username in ("an\ufffd[31mn\ufffd", None)
    site.assert_agrees()


# ------------------------------------------------------------------------ fuzz

SECRETS = st.text("abcdefghkmnpq", min_size=5, max_size=9).map("Zq7".__add__)
WORDS = st.text("abcxyz019-_~", min_size=1, max_size=8)
ENCODERS = st.sampled_from(
    [str, quote, lambda text: quote(text, ""), lambda text: quote(quote(text, ""), "")]
)
PLACES = [
    "/{word}?{name}={secret}",
    "/{word}?{word}=1&{name}={secret}&x=2",
    "/{word};{name}={secret}/{word}",
    "/{word}/{name}={secret}/{secret}",
    "/v/{word};{name}={secret};x=1",
    "/{word}%3F{name}={secret}",
    "/v/{word}%3Fx=1&{name}={secret}",
]
WRAPPED = [
    "https://{word}:{secret}@{word}.example/",
    "https://{secret}@{word}.example/",
    "https:/{secret}@{word}.example/",
    "https:{secret}@{word}.example/",
    "redis:/:{secret}@{word}/0",
    "https://{word}.example/https://{secret}@{word}.example/",
    "https://{word}.example/{word}/https:/{word}:{secret}@{word}.example/",
    "//{word}:{secret}@{word}/",
    "\\\\{word}:{secret}@{word}",
    "https:\\\\{word}:{secret}@{word}",
    "/{word}?{name}={secret}",
    "/{word}?a=1&{name}={secret}",
    "/{word};{name}={secret}",
    "/{word}#{name}={secret}",
    '{{"{name}": "{secret}"}}',
]
AROUND = ["/?next={}", "/?a=1&next={}&b=2", "/v/{}", "/x/{}", "/x;v={}"]


@pytest.fixture
def outputs(make_site: Make, caplog: pytest.LogCaptureFixture) -> Outputs:
    return Outputs(make_site, caplog)


@settings(
    max_examples=examples(150),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(data=st.data(), secret=SECRETS, word=WORDS, name=st.sampled_from(NAMES))
def test_no_secret_of_a_generated_request_is_found_anywhere(
    outputs: Outputs, data: st.DataObject, secret: str, word: str, name: str
) -> None:
    values = {"secret": secret, "word": word, "name": name}
    if data.draw(st.booleans()):
        target = data.draw(st.sampled_from(PLACES)).format(**values)
    else:
        wrapped = data.draw(st.sampled_from(WRAPPED)).format(**values)
        # As a whole, or it would be cut at its own & and ?.
        encoded = data.draw(ENCODERS)(quote(wrapped, ""))
        target = data.draw(st.sampled_from(AROUND)).format(encoded)
    referrer = data.draw(st.sampled_from(["", f"https://x.example{target}", target]))
    found = outputs.of(target, {"Referer": referrer})
    assert [output for output, text in found.items() if secret in text] == []
