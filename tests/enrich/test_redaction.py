"""What is secret by name or shape is replaced; all else stays as strangers sent it."""

import base64
import copy
import gc
import json
import random
import re
import string
import time
import tracemalloc
import weakref
from datetime import date
from urllib.parse import quote

import pytest
from helpers.examples import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from werkzeug.routing import BaseConverter, Map, Rule

from flask_usage_metrics.enrich.privacy.redaction import Redactor
from flask_usage_metrics.enrich.privacy.secrets import REDACTED, SecretFinder
from flask_usage_metrics.errors import ConfigError

JWT = (
    "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0."
    "dozjgNryP4J3jVmNHl0w5N_XgL0n3I9PlFUP0THsR8U"
)
TOKEN = "Zm9vYmFyYmF6cXV4_1x9Kd8Qp2LwT"
ALPHANUMERIC = string.ascii_letters + string.digits

# A busy machine draws too slowly for the usual health check.
FUZZ = settings(
    max_examples=examples(200), deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def redactor_of(parts=(), **how):
    return Redactor(SecretFinder(parts, **how))


REDACTORS = [
    pytest.param(redactor_of(), id="as usual"),
    pytest.param(redactor_of(emails=True), id="emails"),
    # What is put in place of a secret must not become another one.
    pytest.param(redactor_of(["redacted", "é", "1"], emails=True), id="own parts"),
]


# ------------------------------------------------------------------------ names

SECRET_NAMES = [
    *("token", "Token", "access_token", "id-token", "refreshToken", "csrfmiddlewaretoken"),
    *("secret", "client_secret", "CLIENTSECRET", "password", "passwd", "passphrase", "pwd"),
    *("user[password]", "login.pass", "pass", "pin", "otp", "code", "sid", "PHPSESSID_sid"),
    *("apikey", "api_key", "apiKey", "APIKey", "X-API-Key", "key", "keys", "key2", "auth", "auth0"),
    *("sessionid", "JSESSIONID", "PHPSession", "jwt", "email", "e-mail", "user.email", "xsrf"),
    *("oauth", "oauth2", "oauth_verifier_code", "bearer", "Authorization", "cvv", "cvc", "ssn"),
    *("X-Amz-Signature", "X-Amz-Credential", "X-Amz-Security-Token", "AWSAccessKeyId"),
    *("Signature", "sig", "X-Goog-Signature", "private_key", "privatekey", "Key-Pair-Id"),
    *("country_code", "passCode", "passcode", "to ken", "\uff54\uff4f\uff4b\uff45\uff4e"),
    *("PIN", "SORT_KEY", "HTTPAuth", "XMLKeyId"),
    *("pw", "user_pw", "cookie", "Set-Cookie", "PHPSESSID", "totp", "ticket", "hmac", "card"),
    *("cardNumber", "creditcard", "cvv2", "iban", "ssn", "SAMLResponse", "mfa", "nonce", "authkey"),
    *("t\u200bo\u200bken", "\u0442_key", "keyÄ", "clé_pin", "k" * 201),
]
ORDINARY_NAMES = [
    *("", "author", "monkey", "keyword", "keywords", "design", "postcode", "zipcode", "encode"),
    *("passenger", "compass", "page", "q", "sort", "lang", "country", "signal", "sigma", "pinned"),
    *("side", "inside", "authority", "unicode", "codec", "spin", "keyboard", "bypass", "tok", "en"),
    *("discard", "dashboard", "postcard", "taliban", "pawn", "ticketing", "cart", "sessile"),
    *("user[name]", "utm_source", "Löpin", "größe", "日本", "\ud800", "[]", "k" * 200),
]


@pytest.mark.parametrize("name", SECRET_NAMES)
def test_a_name_of_secrets_is_known_in_any_spelling(name):
    secrets = SecretFinder()
    assert secrets.is_secret_name(name)
    assert secrets.is_secret_name(name), "from the cache"


@pytest.mark.parametrize("name", ORDINARY_NAMES)
def test_a_word_that_only_begins_or_ends_like_a_secrets_name_is_none(name):
    secrets = SecretFinder()
    assert not secrets.is_secret_name(name)
    assert not secrets.is_secret_name(name), "from the cache"


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("voucher", "my_VoucherNumber"),
        ("Voucher-Number", "vouchernumbers"),
        ("vouchernumber", "voucher[number]"),
        ("contraseña", "contrasen\u0303a_nueva"),
        ("contrasena", "contraseña"),
        ("a.b", "xabx"),
        ("42", "x42"),
    ],
)
def test_own_parts_match_anywhere_in_a_name_whatever_case_and_separators(part, name):
    assert SecretFinder([part]).is_secret_name(name)
    assert not SecretFinder().is_secret_name(name), "two instances share nothing"
    assert SecretFinder([part]).is_secret_name("token"), "besides the usual ones"
    assert not SecretFinder([part]).is_secret_name("page")


@pytest.mark.parametrize("part", ["", "--", " ", "[]", "\u0301"])
def test_a_part_that_would_be_in_every_name_is_refused(part):
    with pytest.raises(ConfigError) as refusal:
        redactor_of(["voucher", part])
    assert str(refusal.value) == (
        f"TRACK_USAGE_REDACT must hold parts of names with a letter or digit, not {part!r}"
    )


# ------------------------------------------------------------------------ shapes


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(JWT, id="JWT"),
        pytest.param(f"Bearer {JWT}", id="JWT after a word"),
        pytest.param(f"({JWT})", id="JWT in brackets"),
        pytest.param(f"jwt{JWT}", id="JWT in a word"),
        pytest.param(f"a.b.{JWT}", id="JWT after dots"),
        pytest.param("eyJhbGciOiJub25lIn0.e30.", id="JWT that nobody signed"),
        pytest.param("eyJh.e30.c2", id="short JWT"),
        pytest.param("jwteyJhbGciOiJIU.e.c", id="short JWT in a word"),
        pytest.param(
            "eyJhbGciOiJkaXIiLCJlbmMiOiJBMTI4R0NNIn0..48V1_ALb6US04U3b.5eym8TW_c8SuK0ltJ3rpYIz"
            "OeDQz7TALvtu6UG9oMo4vpzs9tX_EFShS8iB7j6ji.XFBoMYUZodetZdvTiFvSkQ",
            id="JWE without a key",
        ),
        pytest.param(TOKEN, id="random"),
        pytest.param(f"see /{TOKEN}/, please", id="random in a sentence"),
        pytest.param(f"my-long-blog-post-title-with-many-words-{TOKEN}", id="random after a slug"),
        pytest.param(f"{TOKEN}.my-long-file-name-with-words.tar.gz", id="random before a slug"),
        pytest.param("d41d8cd98f00b204e9800998ecf8427e", id="hash"),
        pytest.param("DA39A3EE5E6B4B0D3255BFEF95601890AFD80709", id="hash in upper case"),
        pytest.param("11111111111111111111111111111f11", id="a hash of almost only digits"),
        pytest.param("JBSWY3DPEHPK3PXPJBSWY3DPEHPK3PXP", id="base32"),
        pytest.param("qmzJHxvTzXwGqLrKfBdNcPsWvYtHkZgX", id="random letters"),
        pytest.param("aB/cD3+fG/hI4jK/lM5nO6p/Q7rS8tU=", id="base64 with slashes"),
        pytest.param("sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc", id="Stripe"),
        pytest.param("ghp_" + "16C7e42F292c6912E7710c838347Ae178B4a", id="GitHub"),
        pytest.param("xoxb-" + "17653672481-19874698323-pdFZKVeTuE8sk7oOcHrzqqgy", id="Slack"),
        pytest.param("f81d4fae-7dec-11d0-a765-00a0c91e6bf6" + TOKEN, id="after a UUID"),
        pytest.param("f81d4fae-7dec-11d0-a765-00a0c91e6bf6a1b2c3d4e5f6", id="longer than a UUID"),
        pytest.param("507f1f77bcf86cd799439011ab", id="longer than an ObjectId"),
        pytest.param("907f1f77bcf86cd799439011", id="no ObjectId of this time"),
        pytest.param("a1b2c3d4e5f6f81d4fae-7dec-11d0-a765-00a0c91e6bf6", id="earlier than a UUID"),
    ],
)
def test_a_secrets_shape_is_seen_anywhere_in_a_text(text):
    assert SecretFinder().is_secret_text(text)
    assert SecretFinder().is_secret_text(f"á {text}\n")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "507f1f77bcf86cd799439011",
        "my-long-blog-post-title-about-something-2024",
        "the-10-best-cups-of-2024-and-5-more",
        "The-10-Best-Cups-Of-2024-And-5-More",
        "2024-11-24T12:34:56.123456+00:00",
        "2024-11-24T12-34-56.123456789Z",
        "20241124T123456.789012345+0100",
        "IMG_20241124_123456_HDR.jpg",
        "Screenshot_2024-11-24-12-34-56-789_com.android.chrome.png",
        "python-3.11.7-manylinux_2_17_x86_64.manylinux2014_x86_64.whl",
        "numpy-2.1.0-cp313-cp313-manylinux_2_17_x86_64.whl",
        "torch-2.1.0+cu121-cp311-cp311-linux_x86_64.whl",
        "jquery-3.7.1.slim.min.js",
        "bootstrap-icons.5.3.2.bundle.min.css.map",
        "monkeyJar.tar.gz",
        "keyJson.min.js",
        "eyJ.a",
        "eyJ...",
        "internationalization-and-localization",
        "Donaudampfschifffahrtsgesellschaftskapitän",
        "pneumonoultramicroscopicsilicovolcanoconiosis",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaah",
        "XXXXXXXXXXXXXXXXXXXXXXXXXXXXXXXX",
        "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA",
        "abababababababababababababababababab",
        "AbstractSingletonProxyFactoryBean",
        "getUserByIdAndNameFromDatabase",
        "convertUtf8StringToUtf16String",
        "parseHTMLDocumentFromXMLHttpRequest",
        "MAX_CONTENT_LENGTH_EXCEEDED_ERROR",
        "123456789012345678901234567890",
        "9" * 40,
        "GA1.2.1234567890.1234567890",
        "f81d4fae-7dec-11d0-a765-00a0c91e6bf6",
        "F81D4FAE-7DEC-11D0-A765-00A0C91E6BF6",
        "order_f81d4fae-7dec-11d0-a765-00a0c91e6bf6.pdf",
        "f81d4fae-7dec-11d0-a765-00a0c91e6bf6.0b1f9a3c-52d4-4e0e-8a66-3f9d3a1c7e55",
        "dQw4w9WgXcQ",
        "Wie-wird-das-Wetter-am-Wochenende-in-Garmisch-Partenkirchen",
        "czy-przyszlosc-nalezy-do-samochodow-elektrycznych",
        "comment-preparer-un-gateau-au-chocolat-en-10-minutes",
        "kak-prigotovit-shokoladnyy-tort-za-10-minut",
        "how+to+make+a+good+cup+of+coffee+in+5+minutes+or+less",
        "how to make a good cup of coffee in 5 minutes or less",
        "как приготовить шоколадный торт за 10 минут 2024 года",
        "如何在十分钟内制作巧克力蛋糕如何在十分钟内制作巧克力蛋糕",
        "/usr/share/nginx/html/static/css/site.css",
        "products/Category/ItemNumber/2024/spring",
        "v2-x1/c3-d4/e5-f6/g7-h8/i9-j0/k1-l2",
        "........................" * 3,
    ],
)
def test_what_people_and_programs_name_things_is_no_secret(text):
    assert not SecretFinder().is_secret_text(text)


@pytest.mark.parametrize(
    "text",
    [
        "jane@example.com",
        "jane.doe+tag@mail.example.co.uk",
        "mailto:jane@example.com?subject=x",
        "<jane@bücher.example>",
        "Jane <jane@xn--bcher-kva.example>",
        "@jane@mastodon.social",
    ],
)
def test_an_email_address_is_a_secret_if_wanted(text):
    assert SecretFinder(emails=True).is_secret_text(text)
    assert not SecretFinder().is_secret_text(text)


@pytest.mark.parametrize(
    "text",
    [
        *("@", "a@b", "a@b.", "a @ b.com", "a@b..com", "logo@2x.png", "lodash@4.17.21"),
        *("@scope/name.js", "x@1.2.3.4", "https://medium.com/@someone.there/post"),
    ],
)
def test_not_every_at_sign_is_an_email_address(text):
    assert not SecretFinder(emails=True).is_secret_text(text)


TOKENS = {
    "urlsafe 24": lambda source: base64.urlsafe_b64encode(source.randbytes(24)),
    "urlsafe 32": lambda source: base64.urlsafe_b64encode(source.randbytes(32)).rstrip(b"="),
    "hex 16": lambda source: source.randbytes(16).hex().encode(),
    "hex 32": lambda source: source.randbytes(32).hex().encode(),
    "HEX 16": lambda source: source.randbytes(16).hex().upper().encode(),
    "base32 of 20": lambda source: base64.b32encode(source.randbytes(20)),
    "base64 of 32": lambda source: base64.b64encode(source.randbytes(32)),
    "Stripe": lambda source: b"sk_live_" + "".join(source.choices(ALPHANUMERIC, k=24)).encode(),
    "GitHub": lambda source: b"ghp_" + "".join(source.choices(ALPHANUMERIC, k=36)).encode(),
    "alphanumeric 24": lambda source: "".join(source.choices(ALPHANUMERIC, k=24)).encode(),
}


@pytest.mark.parametrize("kind", TOKENS)
def test_of_random_tokens_995_of_1000_are_seen(kind):
    secrets = SecretFinder()
    redactor = Redactor(secrets)
    for seed in range(5):
        source = random.Random(seed)
        tokens = [TOKENS[kind](source).decode() for _ in range(2000)]
        assert sum(map(secrets.is_secret_text, tokens)) >= 0.995 * len(tokens), seed
        hidden = sum(redactor.query(f"x={quote(token)}") == "x=REDACTED" for token in tokens)
        assert hidden >= 0.995 * len(tokens), seed


# en, de, fr, es, it, nl, pl, sv, fi, tr, pt, cs
SENTENCES = """
the best way to keep your kitchen knives sharp without much effort every weekend right through
schnelle rezepte fuer zwischendurch mit frischem gemuese aus dem schwarzwald nachtzug strumpf
comment choisir une bonne chaussure pour courir longtemps sans aucune douleur beaucoup oeuvre
los mejores lugares para viajar con ninos pequenos durante las vacaciones desarrollo rapido
come scegliere gli occhiali giusti per ogni viso secondo gli esperti della moda aggiungi
waarom fietsen gezond blijft ook wanneer het regent achtergrond schrijven ongelijk vrijdag
przyszlosc samochodow elektrycznych wedlug ekspertow wszystko wiecej szczegoly przyklad
varfor svenska skogar mar bra trots varmare somrar sjuksköterska utbildning mjukvara
kesämökki järven rannalla myytävänä heti vapaana yhteystiedot käyttöjärjestelmä
istanbul gezilecek yerler listesi ucuz oteller yazilim gelistirme kullanici girisi
melhores praias do brasil para conhecer neste verao informacoes tambem servicos
nejlepsi restaurace v centru prahy recenze hodnoceni zakaznicky servis vyhledavani
python flask docker linux windows android iphone version update release config upload
"""
WORDS = SENTENCES.split()
NUMBERS = ["2024", "10", "5", "3", "2024-11-24", "v2", "365"]

ORDINARY = {
    "slugs": lambda source: "-".join(
        [*source.choices(WORDS, k=6), *source.sample(NUMBERS, 2), *source.choices(WORDS, k=4)]
    ),
    "titled slugs": lambda source: "-".join(source.choices(WORDS, k=9)).title(),
    "camelCase": lambda source: "".join(word.title() for word in source.choices(WORDS, k=6)),
    "snake_case": lambda source: "_".join(source.choices(WORDS, k=6)).upper(),
    "file names": lambda source: ".".join(
        ["-".join(source.choices(WORDS, k=5)), source.choice(NUMBERS), "min", "js"]
    ),
    "photos": lambda source: f"IMG_{source.randint(20000101, 20301231)}_{source.random():.6f}.jpeg",
    "numbers": lambda source: str(source.getrandbits(160) + 10**24),
    "UUIDs": lambda source: re.sub(
        "(.{8})(.{4})(.{4})(.{4})(.{12})", r"\1-\2-\3-\4-\5", source.randbytes(16).hex()
    ),
    "times": lambda source: (
        f"2024-11-{source.randint(1, 30):02}T{source.randint(10, 23)}%3A"
        f"{source.randint(10, 59)}%3A34.{source.randint(100000, 999999)}%2B00%3A00"
    ),
}


@pytest.mark.parametrize("kind", ORDINARY)
def test_of_ordinary_texts_998_of_1000_stay(kind):
    secrets = SecretFinder()
    redactor = Redactor(secrets)
    for seed in range(5):
        source = random.Random(seed)
        texts = [ORDINARY[kind](source) for _ in range(1000)]
        assert sum(map(secrets.is_secret_text, texts)) <= 0.002 * len(texts), seed
        stays = sum(redactor.query(f"x={text}") == f"x={text}" for text in texts)
        assert stays >= 0.998 * len(texts), seed


# ------------------------------------------------------------------------ queries


@pytest.mark.parametrize(
    ("query", "redacted"),
    [
        pytest.param("", "", id="nothing"),
        pytest.param("page=2&sort=price", "page=2&sort=price", id="nothing secret"),
        pytest.param("a=1&sig=abc&b=2", "a=1&sig=REDACTED&b=2", id="by name"),
        pytest.param("a=1;sig=abc;b=2", "a=1;sig=REDACTED;b=2", id="semicolons"),
        pytest.param("a=1&amp;sig=abc", "a=1&amp;sig=REDACTED", id="an escaped ampersand"),
        pytest.param("sig=abc==", "sig=REDACTED", id="padding"),
        pytest.param("user%5Bpassword%5D=x", "user%5Bpassword%5D=REDACTED", id="encoded name"),
        pytest.param("%74oken=x", "%74oken=REDACTED", id="needlessly encoded name"),
        pytest.param("my+key=x", "my+key=REDACTED", id="a space in the name"),
        pytest.param("key=x&key=y", "key=REDACTED&key=REDACTED", id="twice"),
        pytest.param("token=&a=1", "token=&a=1", id="empty"),
        pytest.param("token&a", "token&a", id="no value"),
        pytest.param("&&=;=&", "&&=;=&", id="empty pairs"),
        pytest.param(f"x={JWT}", "x=REDACTED", id="by shape"),
        pytest.param(f"x=Bearer+{JWT}", "x=REDACTED", id="by shape after a word"),
        pytest.param(f"{JWT}&a=1", "REDACTED&a=1", id="no name"),
        pytest.param(f"{JWT}=&a=1", "REDACTED=&a=1", id="a name of a secret's shape"),
        pytest.param(f"{JWT}=x", "REDACTED=REDACTED", id="such a name with a value"),
        pytest.param(f"={JWT}", "=REDACTED", id="an empty name"),
        pytest.param(f"x={JWT.replace('.', '%2E')}", "x=REDACTED", id="encoded shape"),
        pytest.param("x=aB+cD3+fG+hI4jK+lM5nO6p+Q7rS8tU=", "x=REDACTED", id="pluses"),
        pytest.param("next=%2Freset%3Ftoken%3Dabc", "next=REDACTED", id="a URL"),
        pytest.param("next=/reset?a=1%26token=abc", "next=REDACTED", id="a URL not encoded"),
        pytest.param(
            f"next={quote(quote('/a?next=' + quote('/reset?token=abc', ''), ''), '')}",
            "next=REDACTED",
            id="a URL in a URL in a URL",
        ),
        pytest.param("token%3Dabc", "REDACTED", id="a pair encoded as a whole"),
        pytest.param("a%3Ftoken%3Dabc=1", "REDACTED=REDACTED", id="a pair in a name"),
        pytest.param("x=y=token=abc", "x=REDACTED", id="a pair after an equals sign"),
        pytest.param(
            "variables=" + quote('{"a": 1, "password" : "x"}'), "variables=REDACTED", id="JSON"
        ),
        pytest.param("v=" + quote('{"author": "x"}'), "v=%7B%22author%22%3A%20%22x%22%7D", id="{}"),
        pytest.param("next=%2Ftoken%3Fa%3D1", "next=%2Ftoken%3Fa%3D1", id="a harmless URL"),
        pytest.param("q=what+is+a+token", "q=what+is+a+token", id="a word about secrets"),
        pytest.param("e=jane%40example.com", "e=jane%40example.com", id="an address"),
        pytest.param("x=%&y=%zz&z=%ff&%=1", "x=%&y=%zz&z=%ff&%=1", id="wrong escapes"),
        pytest.param("q=日本&ключ=ü\ud800", "q=日本&ключ=ü\ud800", id="not ASCII"),
        pytest.param("ab" * 101 + "=1", "ab" * 101 + "=REDACTED", id="too long a name to judge"),
    ],
)
def test_only_the_secrets_of_a_query_are_replaced(query, redacted):
    redactor = redactor_of()
    assert redactor.query(query) == redacted
    assert redactor.query(query) == redacted, "from the cache"
    long = "&".join(["page=2"] * 100)
    assert redactor.query(f"{long}&{query}") == f"{long}&{redacted}", "too long for the cache"


def test_an_address_in_a_query_is_replaced_if_wanted():
    redactor = redactor_of(emails=True)
    assert redactor.query("e=jane%40example.com&a=b") == "e=REDACTED&a=b"
    assert redactor.query("jane%40example.com=1") == "REDACTED=REDACTED"


def percent_encoded(text):
    return "".join(f"%{byte:02X}" for byte in text.encode())


ENCODINGS = [str, quote, percent_encoded, lambda text: quote(quote(text, ""), "")]
ODD_TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0"), max_size=300),
    st.text("ab=&;%+/?#\"'25eyJ.-_@ \\é", max_size=300),
    st.lists(
        st.sampled_from(
            [
                *("token", "=", "&", ";", "%3D", "%26", "%25", "%", "a", "page", "?", "é", "=="),
                *(JWT, TOKEN, "jane@example.com", "eyJ", '"', ":", "password", "/", REDACTED),
            ]
        ),
        max_size=30,
    ).map("".join),
)
PAIRS = st.lists(
    st.tuples(
        st.sampled_from([name for name in ORDINARY_NAMES if name and len(name) < 200])
        .filter(lambda name: name != "\ud800")
        .map(lambda name: quote(name, "")),
        st.text("abcdefghijk éß/12,.", max_size=12).map(quote),
    ).map("=".join),
    max_size=6,
)


@pytest.mark.parametrize("redactor", REDACTORS)
@FUZZ
@given(query=ODD_TEXTS)
def test_redacting_a_query_never_raises_and_again_changes_nothing(redactor, query):
    redacted = redactor.query(query)
    assert redactor.query(redacted) == redacted
    given_pairs, pairs = re.split("([&;])", query), re.split("([&;])", redacted)
    assert len(given_pairs) == len(pairs)
    for given_pair, pair in zip(given_pairs, pairs, strict=True):
        name, equals, value = given_pair.partition("=")
        hidden = REDACTED if value else ""
        assert pair in (given_pair, f"{name}{equals}{hidden}", f"{REDACTED}{equals}{hidden}")


@FUZZ
@given(
    before=PAIRS,
    after=PAIRS,
    name=st.sampled_from(
        [name for name in SECRET_NAMES if name.isascii() and len(name) < 200 and name != "to ken"]
    ),
    secret=st.text(ALPHANUMERIC, min_size=8, max_size=40).map("Xy".__add__),
    encode_name=st.sampled_from(ENCODINGS[:3]),
    encode_secret=st.sampled_from(ENCODINGS),
    encode_url=st.sampled_from([None, *ENCODINGS[1:]]),
)
def test_a_secret_planted_under_a_secrets_name_is_gone_and_nothing_else(
    before, after, name, secret, encode_name, encode_secret, encode_url
):
    if encode_url is None:
        name, value = encode_name(name), encode_secret(secret)
    else:
        name, value = "next", encode_url(f"/x?a=1&{encode_name(name)}={secret}")
        value = value.replace("&", "%26")
    redacted = redactor_of().query("&".join([*before, f"{name}={value}", *after]))
    assert redacted == "&".join([*before, f"{name}=REDACTED", *after])
    assert secret not in redacted


@FUZZ
@given(
    before=PAIRS,
    after=PAIRS,
    kind=st.sampled_from(["hex 16", "hex 32"]),
    seed=st.integers(0, 2**32),
    encode=st.sampled_from(ENCODINGS),
    around=st.sampled_from(["{}", "x={}", "{}=x", "x=a%20{}", "x=my-long-slug-in-front-of-it-{}"]),
)
def test_a_secret_planted_by_its_shape_is_gone(before, after, kind, seed, encode, around):
    secret = TOKENS[kind](random.Random(seed)).decode()
    redacted = redactor_of().query("&".join([*before, around.format(encode(secret)), *after]))
    pair = {"{}": "REDACTED", "{}=x": "REDACTED=REDACTED"}.get(around, "x=REDACTED")
    assert redacted == "&".join([*before, pair, *after])


# ------------------------------------------------------------------------ values


@pytest.mark.parametrize(
    ("values", "redacted"),
    [
        pytest.param({"token": "abc", "a": 1}, {"token": REDACTED, "a": 1}, id="by name"),
        pytest.param({"a": 1, "x": JWT}, {"a": 1, "x": REDACTED}, id="by shape"),
        pytest.param({"key": 7}, {"key": REDACTED}, id="a number"),
        pytest.param({"key": True}, {"key": REDACTED}, id="a boolean"),
        pytest.param({"key": [1]}, {"key": REDACTED}, id="a list under the name"),
        pytest.param({"key": {"a": 1}}, {"key": REDACTED}, id="a dict under the name"),
        pytest.param({"a": {"b": {"pin": 1}}}, {"a": {"b": {"pin": REDACTED}}}, id="nested"),
        pytest.param({"a": ["x", [JWT], 1]}, {"a": ["x", [REDACTED], 1]}, id="in a list"),
        pytest.param({"a": [{"pwd": "x"}, 1]}, {"a": [{"pwd": REDACTED}, 1]}, id="dict in a list"),
        pytest.param({"apiKey": "x", "z": None}, {"apiKey": REDACTED, "z": None}, id="camelCase"),
    ],
)
def test_values_are_replaced_by_name_whatever_their_type_and_texts_by_shape(values, redacted):
    given_values = copy.deepcopy(values)
    assert redactor_of().values(given_values) == redacted
    assert list(redactor_of().values(given_values)) == list(values), "in the order they came in"
    assert given_values == values, "they were left as they are"


@pytest.mark.parametrize(
    ("values", "redacted"),
    [
        ({"tokens_used": 512, "a": 1}, None),
        ({"session_minutes": 1.5, "is_session": False}, None),
        ({"a": {"tokens": 5}}, None),
        ({"token": "abc"}, {"token": REDACTED}),
        ({"token": ["abc"]}, {"token": REDACTED}),
        ({"a": [{"tokens": 5, "token": "x"}]}, {"a": [{"tokens": 5, "token": REDACTED}]}),
        ({"a": JWT}, {"a": REDACTED}),
    ],
)
def test_the_apps_own_numbers_stay_under_any_name(values, redacted):
    result = redactor_of().variables(values)
    assert result == (redacted or values)
    assert (result is values) is (redacted is None)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"a": 1, "b": "x", "c": [1, {"d": None}], "author": "y"},
        {"token": None, "a": {"token": None}},
        {"token": json.loads(f'"{REDACTED}"'), "a": [REDACTED]},
    ],
)
def test_values_without_a_secret_are_the_same_object(values):
    assert redactor_of().values(values) is values
    assert redactor_of().variables(values) is values


def test_own_parts_and_addresses_count_in_values():
    redactor = redactor_of(["voucher"], emails=True)
    values = {"VoucherNo": 5, "by": "jane@example.com", "page": 2}
    assert redactor.values(values) == {"VoucherNo": REDACTED, "by": REDACTED, "page": 2}


@pytest.mark.parametrize("wrap", [lambda inner: {"a": inner}, lambda inner: [inner]])
def test_what_is_nested_too_deep_to_look_into_is_not_kept(wrap):
    inner = {"x": JWT}
    for _ in range(5000):
        inner = wrap(inner)
    deep = {"a": inner, "b": 1}
    redacted = redactor_of().values(deep)
    assert JWT not in json.dumps(redacted)
    assert redacted["b"] == 1
    shallow = {"a": {"b": [[[{"c": "x"}]]]}}
    assert redactor_of().values(shallow) is shallow


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9)
    )
    | st.sampled_from([JWT, TOKEN, "jane@example.com"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["a", "page", "token", "pin", "author"]), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


@pytest.mark.parametrize("redactor", REDACTORS)
@FUZZ
@given(values=st.dictionaries(st.sampled_from(["a", "b", "key", "x[pwd]"]), JSON, max_size=3))
def test_redacting_values_leaves_them_alone_and_is_complete(redactor, values):
    before = copy.deepcopy(values)
    for redact in (redactor.values, redactor.variables):
        redacted = redact(values)
        assert values == before
        assert (redacted is values) is (redacted == values)
        assert redact(redacted) is redacted
        assert JWT not in json.dumps(redacted)
        assert TOKEN not in json.dumps(redacted)


# ------------------------------------------------------------------------ paths


class Regex(BaseConverter):
    def __init__(self, url_map, pattern):
        super().__init__(url_map)
        self.regex = pattern


class Day(BaseConverter):
    regex = r"\d{8}"

    def to_python(self, value):
        return date(int(value[:4]), int(value[4:6]), int(value[6:]))


class Names(BaseConverter):
    regex = r"[a-z]+(?:/[a-z]+)*"

    def to_python(self, value):
        return value.split("/")


def match(rule, path):
    """Return the arguments Werkzeug gives the view, as the JSON values a record has."""
    converters = {"regex": Regex, "day": Day, "names": Names}
    urls = Map([Rule(rule, endpoint="x")], converters=converters).bind("localhost")
    return json.loads(json.dumps(urls.match(path)[1], default=str))


@pytest.mark.parametrize(
    ("rule", "path", "redacted"),
    [
        ("/", "/", "/"),
        ("/reset/<token>", "/reset/abc", "/reset/REDACTED"),
        ("/reset/<token>/", "/reset/abc/", "/reset/REDACTED/"),
        ("/token/<token>/x", "/token/token/x", "/token/REDACTED/x"),
        ("/u/<name>/<string(length=3):pin>", "/u/123/123", "/u/123/REDACTED"),
        ("/f/<int:n>/<path:rest>", "/f/005/a/b", "/f/005/a/b"),
        ("/f/<int:key>/<path:rest>", "/f/005/a/005", "/f/REDACTED/a/005"),
        ("/f/<path:key>/x", "/f/a/b/x/x", "/f/REDACTED/x"),
        ("/f/<path:key>", "/f/a/b/", "/f/REDACTED/"),
        ("/<path:rest>/<code>", "/a/b/c", "/a/b/REDACTED"),
        ("/<day:day>/<day:sid>/<x>", "/20241124/20241124/20241124", "/20241124/REDACTED/20241124"),
        ("/<any(a, b, \"c(d)\"):x>/<any(pin, 'sig'):key>", "/a/pin", "/a/REDACTED"),
        ('/<regex("[a-z]+(/)?"):x>/<token>', "/ab/cd", "/ab/REDACTED"),
        ("/<regex('[^/<>]{2,}'):token>/<x>", "/ab/cd", "/REDACTED/cd"),
        ("/n/<names:keys>/<x>", "/n/a/b/c/d", "/n/REDACTED/d"),
        ("/<a>-<token>.json", "/x-abc.json", "/x-REDACTED.json"),
        ("/<token>-<b>.json", "/x-abc.json", "/REDACTED-abc.json"),
        ("/v<int:n>-<token>.json", "/v005-abc.json", "/v005-REDACTED.json"),
        ("/<int:a>.<int:pin>.<int:b>", "/01.02.03", "/01.REDACTED.03"),
        ("/<a>-<token>.json", "/x-y-abc.json", "/x-y-REDACTED.json"),
        ("/<token>-<a>.json", "/x-y-abc.json", "/REDACTED-abc.json"),
        ("/<float:a>.<token>", "/1.50.x", "/REDACTED"),
        ("/<string(length=2):a><token>", "/abcd", "/abREDACTED"),
        ("/<int:a><token>/x", "/007bond/x", "/REDACTED/x"),
        ("/é ü/(<token>)/+", "/é ü/(a b)/+", "/é ü/(REDACTED)/+"),
        ("/<slug>", f"/{JWT}", "/REDACTED"),
        ("/<slug>/<x>", f"/x-{JWT}.html/y", "/REDACTED/y"),
        ("/<slug>.html", f"/{TOKEN}.html", "/REDACTED.html"),
        ("/<path:p>/end", "/aB/cD3+fG/hI4jK/lM5nO6p/Q7rS8tU=/end", "/REDACTED/end"),
        ("/<slug>", "/my-post", "/my-post"),
        ("/x/<name>", "/x/author", "/x/author"),
    ],
)
def test_the_part_of_the_path_that_is_a_secret_argument_is_replaced(rule, path, redacted):
    redactor = redactor_of()
    arguments = match(rule, path)
    given_arguments = copy.deepcopy(arguments)
    assert redactor.path(path, rule, arguments) == redacted
    assert arguments == given_arguments
    # Also when the arguments were redacted first.
    assert TOKEN not in redactor.path(path, rule, redactor.values(arguments))


@pytest.mark.parametrize(
    ("path", "redacted"),
    [
        ("", ""),
        ("/", "/"),
        ("/products/42/", "/products/42/"),
        (f"/reset/{JWT}", "/reset/REDACTED"),
        (f"/a/{TOKEN}/b/x{TOKEN}.json", "/a/REDACTED/b/REDACTED"),
        (f"//a//{TOKEN}//", "//a//REDACTED//"),
        ("/token/abc", "/token/abc"),
        ("/users/f81d4fae-7dec-11d0-a765-00a0c91e6bf6", None),
        ("/u/jane@example.com", None),
        ("/a b/é/日本/\ud800", None),
    ],
)
def test_segments_are_replaced_by_shape_whether_a_rule_matched_or_not(path, redacted):
    expected = path if redacted is None else redacted
    assert redactor_of().path(path) == expected
    assert redactor_of().path(path) == redactor_of().path(expected), "again changes nothing"
    assert redactor_of().path(path, "/static", {}) == expected
    assert redactor_of().path(path, "/<path:rest>", {"rest": path[1:]}).count(TOKEN) == 0
    assert redactor_of().path("/x/" * 300 + path) == "/x/" * 300 + expected, (
        "too long for the cache"
    )


def test_an_address_in_a_path_is_replaced_if_wanted():
    redactor = redactor_of(emails=True)
    assert redactor.path("/u/jane@example.com/x") == "/u/REDACTED/x"
    rule, arguments = "/u/<who>.json", {"who": "jane@example.com"}
    assert redactor.path("/u/jane@example.com.json", rule, arguments) == "/u/REDACTED.json"


@pytest.mark.parametrize(
    ("rule", "path"),
    [
        ("/reset/<token>", "/other/abc"),
        ("/reset/<token>", "/reset/abc/def"),
        ("/reset/<token>", "/reset"),
        ("/reset/<token>", "/reset/"),
        ("/reset/<token>.json", "/reset/abc.jso"),
        ("/x<token>x", "/x"),
        ("/x<token>x", "/xx"),
        ("/<path:a>/x/<path:token>", "/1/x/2/x/3"),
        ("/x/<path:a>/<token>/y", "/x"),
        ("/<token>/<a>-<b>.json", "/abc/x-y.jso"),
    ],
)
def test_a_path_that_does_not_fit_its_rule_gives_the_rule(rule, path):
    assert redactor_of().path(path, rule, {"token": "abc"}) == rule


def test_what_varies_is_replaced_whole_where_it_can_be_cut_in_several_ways_or_in_none():
    redactor = redactor_of()
    assert redactor.path("/v7-a-b.js", "/v<n>-<token>.js", {"token": "x"}) == "/vREDACTED.js"
    assert redactor.path("/a.b-c", "/<a>-<token>.<b>", {"token": "x"}) == "/REDACTED"


def test_a_secret_argument_that_the_app_took_out_is_replaced_all_the_same():
    assert redactor_of().path("/reset/abc", "/reset/<token>", {}) == "/reset/REDACTED"
    assert redactor_of().path("/reset/abc", "/reset/<token>", None) == "/reset/REDACTED"
    assert redactor_of().path("/reset/abc", "/reset/<name>", {"token": "x"}) == "/reset/abc"


def test_an_argument_that_was_redacted_before_the_path_is_known_as_secret():
    assert redactor_of().path("/f/a/b", "/f/<path:rest>", {"rest": REDACTED}) == "/f/REDACTED"


@pytest.mark.parametrize("path", ["/reset/abc", "/reset/abc/"])
@pytest.mark.parametrize("rule", ["/reset/<token>", "/reset/<token>/"])
def test_a_slash_at_the_end_more_or_less_does_not_matter(rule, path):
    expected = path.replace("abc", REDACTED)
    assert redactor_of().path(path, rule, {"token": "abc"}) == expected


RULES = [
    *("/<a>-<token>-<b>.json", "/<token>/<path:rest>", "/<path:token>/<x>", "/x/<a>/<token>/"),
    *("/<token>.<a>", "/<int:n>-<token>", "/<a>/<b><token>", "/(<token>)"),
]


@FUZZ
@given(rule=st.sampled_from(RULES), data=st.data())
def test_a_secret_argument_is_never_left_on_a_path_that_werkzeug_matched(rule, data):
    texts = st.text("ab-._5é ", min_size=1, max_size=6)

    def name(found):
        return found[0].strip("<>").rpartition(":")[2]

    # The token may as well be cut elsewhere by Werkzeug: it decides what is an argument.
    drawn = {"n": "007", "token": data.draw(texts)}
    path = re.sub("<.*?>", lambda found: drawn.get(name(found)) or data.draw(texts), rule)
    arguments = match(rule, path)
    arguments_on_path = {**arguments, "token": REDACTED, "n": "007"}
    expected = re.sub("<.*?>", lambda found: arguments_on_path[name(found)], rule)
    # The value 7 does not tell where 007-a-b is to be cut.
    allowed = [expected, f"/{REDACTED}"] if "int:" in rule else [expected]
    assert redactor_of().path(path, rule, arguments) in allowed


@pytest.mark.parametrize("redactor", REDACTORS)
@FUZZ
@given(
    path=ODD_TEXTS,
    rule=st.one_of(st.none(), st.sampled_from(RULES), st.text("/<>:ab(')x", max_size=20)),
    arguments=st.one_of(st.none(), st.dictionaries(st.sampled_from(["a", "token"]), JSON)),
)
def test_redacting_a_path_never_raises(redactor, path, rule, arguments):
    redacted = redactor.path(path, rule, arguments)
    assert redactor.path(redacted) == redacted or redacted == rule
    assert redactor.path(redactor.path(path)) == redactor.path(path)


# ------------------------------------------------------------------------ URLs


@pytest.mark.parametrize(
    ("url", "redacted"),
    [
        ("https://example.com/a/b?token=x#y", "https://example.com/a/b"),
        ("https://example.com", "https://example.com"),
        ("https://example.com?token=x", "https://example.com"),
        ("https://example.com#token=x", "https://example.com"),
        ("HTTP://Example.COM:8080/", "HTTP://Example.COM:8080/"),
        ("https://jane:pw@example.com/a", "https://example.com/a"),
        ("https://a@b:c@example.com:1/a@b", "https://example.com:1/a@b"),
        ("https://[2001:db8::1]:80/a", "https://[2001:db8::1]:80/a"),
        ("android-app://com.google.android.gm/", "android-app://com.google.android.gm/"),
        (" https://example.com/a", ""),
        (f"https://example.com/reset/{JWT}/x", "https://example.com/reset/REDACTED/x"),
        (f"https://example.com/{percent_encoded(TOKEN)}", "https://example.com/REDACTED"),
        ("https://example.com/caf%C3%A9/%zz", "https://example.com/caf%C3%A9/%zz"),
        ("https://jane:pw@example.com\\a", ""),
        ("https://example.com\\@pw", ""),
        ("https://jane\\:pw@example.com/a", ""),
        ("https:\\\\jane:pw@example.com/a", ""),
        ("https://example.com/\\jane:pw@example.net/a", ""),
        ("https://example.com/a?b=\\c", "https://example.com/a"),
        ("https://bücher.example/ü", "https://bücher.example/ü"),
        (f"myapp://{JWT}/a", "myapp://REDACTED/a"),
        ("https://jane:pw/", ""),
        ("https://jane%3Apw%40example.com/", ""),
        ("https://[::1/", ""),
        ("", ""),
        ("/a/b?token=x", ""),
        ("//example.com/a", ""),
        ("about:blank", ""),
        ("javascript:alert('token=x')", ""),
        ("mailto:jane@example.com", ""),
        ("token=https://example.com/", ""),
        ("1http://example.com/", ""),
    ],
)
def test_of_a_url_only_scheme_host_port_and_path_are_kept(url, redacted):
    assert redactor_of().url(url) == redacted
    assert redactor_of().url(redacted) == redacted


@pytest.mark.parametrize("redactor", REDACTORS)
@FUZZ
@given(url=st.one_of(ODD_TEXTS, ODD_TEXTS.map("https://".__add__), ODD_TEXTS.map("a://b/".__add__)))
def test_redacting_a_url_never_raises_and_keeps_no_query(redactor, url):
    redacted = redactor.url(url)
    assert redactor.url(redacted) == redacted
    assert not {"?", "#"}.intersection(redacted)
    assert "@" not in redacted.partition("://")[2].partition("/")[0].partition("\\")[0]
    assert JWT not in redacted


def test_an_address_in_a_urls_path_is_replaced_if_wanted():
    url = "https://example.com/u/jane%40example.com"
    assert redactor_of(emails=True).url(url) == "https://example.com/u/REDACTED"


# ------------------------------------------------------------------------ cost

HOSTILE = [
    *("a", "=", "&", ";", "%", "%25", "%41", "%c3", '"', '"a', '"a" ', "a=", "a=&", "+", ".", "-"),
    *("eyJ", "-eyJ", "eyJ.", "eyJa.b", "@a.", "a@", "a@b.", "://", "x=[", "aB", "aB3x", "A", "0"),
    *("a1b2c3d4-", "f81d4fae-7dec-11d0-a765-00a0c91e6bf6", "f", "token", "/", "\u0301", " ", "é"),
    "(",
]


@pytest.mark.parametrize("unit", HOSTILE)
def test_hostile_input_takes_linear_time(unit):
    # 16 times what a record keeps: what takes quadratic time takes minutes, not 0.2 s.
    text = (unit * 65536)[:65536]
    started = time.process_time()
    for hostile in (text, f"x=={text}", f"{text}=x", f'x="{text}', f"x=a@{text}1"):
        redactor_of(emails=True).query(hostile)
    redactor_of(emails=True).path(text)
    redactor_of(emails=True).url(f"a://{text}")
    redactor_of(emails=True).values({"a": text, text: 1})
    assert time.process_time() - started < 3


@pytest.mark.parametrize("rule", ["/<a>-<b>-<c>-<token>.json", "/<path:a>-<path:b>/<c>-<token>.x"])
def test_a_cut_path_takes_linear_time_whatever_its_rule(rule):
    started = time.process_time()
    assert redactor_of().path("/" + "-" * 20000, rule, {"token": "x"}) == rule
    assert redactor_of().path("/" + "-/" * 20000, rule, {"token": "x"}) == rule
    assert time.process_time() - started < 1


@pytest.mark.alone
def test_a_repeated_query_and_an_ordinary_one_cost_microseconds():
    redactor = redactor_of(emails=True)

    def microseconds(queries):
        started = time.process_time()
        for query in queries:
            redactor.query(query)
        return (time.process_time() - started) / len(queries) * 1e6

    first = [f"page={number}&sort=price" for number in range(4000)]
    # Measured 3 µs, and 0.2 µs instead of 100; a slow machine takes several times as long.
    assert min(microseconds([f"x{turn}={q}" for q in first]) for turn in range(3)) < 100
    assert min(microseconds(["&".join(first[:20])] * 4000) for _ in range(3)) < 5


@pytest.mark.slow
def test_what_is_remembered_is_bounded_in_number_and_length():
    secrets = SecretFinder()
    redactor = Redactor(secrets)
    tracemalloc.start()
    try:
        for number in range(60):
            long = f"{number}" + " " * 50_000
            redactor.query(f"{long}=1&a={long}")
            secrets.is_secret_name(long)
            redactor.path(f"/{long}")
        assert tracemalloc.get_traced_memory()[0] < 2_000_000, "length"
        for number in range(4096 * 3):
            redactor.query(f"a{number}={number}" + "&" * 400)
            redactor.path(f"/{number}" + "-" * 400)
            secrets.is_secret_name(f"{number}" + "-" * 190)
        assert tracemalloc.get_traced_memory()[0] < 7_000_000, "number"
    finally:
        tracemalloc.stop()


def test_a_redactor_that_nobody_holds_is_given_back():
    redactor = redactor_of(["voucher"])
    redactor.query("a=1")
    gone = weakref.ref(redactor)
    del redactor
    gc.collect()
    assert gone() is None
