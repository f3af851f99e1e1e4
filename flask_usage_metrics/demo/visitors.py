"""Simulated visitors from all over the world: who they are, the requests they send."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import closing, suppress
from http.client import HTTPConnection, HTTPException
from threading import Event

HOST = "127.0.0.1"
VISITORS = 8  # at a time

# Country, its share, a network registered there, the language people prefer.
PLACES = """
US 14 73.15.20. en     US 6 2601:640:1:: en   GB 8 86.130.20. en    DE 8 80.187.100. de
FR 6 90.76.20. fr      NL 6 145.97.20. nl     IN 6 49.36.10. hi     CA 4 99.224.10. en
ES 4 88.6.20. es       IT 4 79.20.10. it      JP 4 126.10.20. ja    BR 4 177.32.10. pt
DE 3 2003:c0:8f:: de   CH 3 85.0.10. de       PL 3 83.20.10. pl     SE 3 85.224.10. sv
AU 3 1.128.10. en      MX 3 189.128.10. es    IE 2 86.40.10. en     AT 2 62.178.10. de
BE 2 81.240.10. nl     PT 2 85.240.10. pt     NO 2 84.208.10. nb    DK 2 80.160.10. da
FI 2 84.248.10. fi     TR 2 88.224.10. tr     KR 2 121.130.10. ko   ID 2 36.64.10. id
VN 2 14.160.10. vi     ZA 2 105.224.10. en    GR 1 79.128.10. el    IL 1 79.176.10. he
AE 1 86.96.10. ar      TW 1 114.32.10. zh     SG 1 116.86.10. en    PH 1 112.198.10. en
NZ 1 122.56.10. en     AR 1 190.16.10. es     CL 1 190.160.10. es   KE 1 105.160.10. en"""

# What a kind of visitor does, in this order: how likely, method, target, form.
SHOPPING = """
.6 GET /               .5 GET /search?q=tea   .9 GET /product/{n}   .6 GET /product/{n}
.4 GET /product/{n}    .2 GET /search?q=cup   .3 GET /product/{n}   .3 POST /cart product={n}
.3 GET /cart           .16 POST /checkout card=fine&instalments=3   .04 POST /checkout card=late
.05 POST /checkout card=declined              .04 POST /checkout card=fine&instalments=0"""

CRAWLING = """
1 GET /product/{n}     .8 GET /product/{n}    .8 GET /product/{n}   .5 GET /product/{n}
.5 GET /product/{n}    .3 GET /product/99     .3 GET /feed.xml"""

CALLING = """
1 GET /api/stock/{n}   .6 GET /api/stock/{n}  .5 POST /api/orders product={n}
.3 GET /api/orders.csv"""

READING = "1 GET /feed.xml"
SCANNING = "1 GET /.env  .8 GET /wp-login.php  .5 POST / x=1"

CHROME = "AppleWebKit/537.36 (KHTML, like Gecko) Chrome/137.0.0.0"
SAFARI = "AppleWebKit/605.1.15 (KHTML, like Gecko) Version/18.5"
AI = "Mozilla/5.0 AppleWebKit/537.36 (KHTML, like Gecko; compatible;"

# Share of the visitors, what they do, network (empty: one of `PLACES`), User-Agent.
KINDS = (
    (19, SHOPPING, "", f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) {CHROME} Safari/537.36"),
    (18, SHOPPING, "", f"Mozilla/5.0 (Linux; Android 10; K) {CHROME} Mobile Safari/537.36"),
    (15, SHOPPING, "", "Mozilla/5.0 (iPhone; CPU iPhone OS 18_5 like Mac OS X) "
     f"{SAFARI} Mobile/15E148 Safari/604.1"),
    (7, SHOPPING, "", "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Gecko/20100101 Firefox/139.0"),
    (4, CRAWLING, "66.249.66.",
     "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)"),
    (3, CRAWLING, "20.171.207.", f"{AI} GPTBot/1.2; +https://openai.com/gptbot)"),
    (3, CRAWLING, "216.73.216.", f"{AI} ClaudeBot/1.0; +claudebot@anthropic.com)"),
    (4, "1 GET /product/{n}", "20.171.208.", f"{AI} ChatGPT-User/1.0; +https://openai.com/bot"),
    (6, CALLING, "46.4.10.", "python-requests/2.32.3"),
    (2, CALLING, "", "curl/8.5.0"),
    (8, "1 HEAD /", "167.99.10.",
     "Mozilla/5.0+(compatible; UptimeRobot/2.0; http://www.uptimerobot.com/)"),
    (5, READING, "51.15.20.", "FreshRSS/1.24.1 (Linux; https://freshrss.org)"),
    (2, SCANNING, "45.146.164.", "Mozilla/5.0 zgrab/0.x"),
)  # fmt: skip

Visit = tuple[str, str, dict[str, str], str]
"""A request: method, target, headers, form."""


def visits(rng: random.Random) -> Iterator[Visit]:
    """Yield the requests of visitors, one visitor after the other, without end."""
    places = re.findall(r"(..) (\d+) (\S+) (..)", PLACES)
    shares = [int(share) for _, share, _, _ in places]
    while True:
        _, way, network, agent = rng.choices(KINDS, [kind[0] for kind in KINDS])[0]
        country, _, home, language = rng.choices(places, shares)[0]
        # A number without leading zeros ends an address of IPv4 as well as one of IPv6.
        address = f"{network or home}{rng.randint(1, 254)}"
        headers = {"User-Agent": agent, "X-Forwarded-For": address}
        if way == SHOPPING:
            headers["Accept-Language"] = f"{language}-{country},{language};q=0.9,en;q=0.5"
        if way == READING and rng.random() < 0.7:
            headers["If-None-Match"] = '"monday"'
        if way == CALLING and rng.random() < 0.7:
            headers["Authorization"] = "Basic cGFydG5lcjpzZWNyZXQ="  # partner:secret
        for chance, step in re.findall(r"(\S+) ([A-Z]+ \S+(?: \S+=\S+)?)", way):
            number = str(min(int(rng.expovariate(0.12)) + 1, 40))  # some sell better than others
            if rng.random() < float(chance):
                method, target, *form = step.replace("{n}", number).split()
                yield method, target, headers, "".join(form)


def send(port: int, todo: Iterator[Visit], pause_seconds: float, stopped: Event) -> int:
    """Send requests until there are no more, or until stopped; return the number sent.

    Args:
        port: The shop's, on `HOST`.
        todo: The requests.
        pause_seconds: Longest pause before a request.
        stopped: Ends a pause.
    """
    sent = 0
    while not stopped.wait(pause_seconds * random.random()) and (visit := next(todo, None)):
        sent += 1
        with suppress(OSError, HTTPException):  # what got no answer is missing in the sums
            ask(port, *visit)
    return sent


def ask(
    port: int, method: str, target: str, headers: dict[str, str] | None = None, form: str = ""
) -> str:
    """Send one request to the shop and return the body of its answer."""
    kind = {"Content-Type": "application/x-www-form-urlencoded"} if form else {}
    with closing(HTTPConnection(HOST, port, timeout=10)) as connection:
        connection.request(method, target, form or None, {**(headers or {}), **kind})
        return connection.getresponse().read().decode()
