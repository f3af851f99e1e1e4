"""Countries without asking anybody: the setting, headers, database files, iptocc."""

import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
from helpers.process import run_python
from hypothesis import given
from hypothesis import strategies as st
from mmdb_writer import MMDBWriter
from netaddr import IPSet

from flask_usage_metrics.enrich.country import (
    Answer,
    CountryLookup,
    Limits,
    make_country_lookup,
    mmdb,
)
from flask_usage_metrics.enrich.country.answer import ISO_CODES
from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.runtime.faults import Faults

UNKNOWN = Answer()


def countries(setting, *, trusted_proxies=True, faults=None, limits=None, **other) -> CountryLookup:
    given = {"use_freegeoip": False, "freegeoip_endpoint": None, "function": None} | other
    return make_country_lookup(
        setting,
        trusted_proxies=trusted_proxies,
        faults=faults or Faults(),
        limits=limits,
        **given,
    )


def country(setting, address="8.8.8.8", headers=(), trusted=True):
    return countries(setting).locate(address, headers, trusted).country


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


# -------------------------------------------------------------------------------- the setting


def test_auto_knows_countries_without_any_set_up():
    assert country("auto") == "US"
    assert countries("auto").headers == ()


def test_none_and_an_empty_list_know_nothing():
    assert country(None) is None
    assert country([]) is None


def without(monkeypatch, package, module):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"flask_usage_metrics.enrich.country.{module}", raising=False)


def test_auto_without_iptocc_says_once_what_to_install_and_knows_nothing(monkeypatch, caplog):
    without(monkeypatch, "iptocc", "offline")
    caplog.set_level(logging.INFO, logger="flask_usage_metrics")
    nowhere = countries("auto")
    assert nowhere.locate("8.8.8.8", (), False) == UNKNOWN
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "pip install 'flask-usage-metrics[country]'" in caplog.text


@pytest.mark.parametrize(
    ("setting", "package", "module"),
    [("iptocc", "iptocc", "offline"), ("mmdb:/x.mmdb", "maxminddb", "mmdb")],
)
def test_a_missing_package_is_named_with_how_to_get_it(monkeypatch, setting, package, module):
    without(monkeypatch, package, module)
    with pytest.raises(ConfigError) as caught:
        countries(setting)
    expected = f"{package} is not installed: pip install 'flask-usage-metrics[country]'"
    assert str(caught.value) == expected


@pytest.mark.parametrize(
    "setting",
    ["", "geoip", "header:", "header:CF IP", "mmdb:", 7, True, {}, [None], ["auto", 1], "AUTO"],
)
def test_a_wrong_setting_is_named_with_what_is_expected(setting):
    with pytest.raises(ConfigError, match=r"^TRACK_USAGE_COUNTRY must be 'auto', .*, not "):
        countries(setting)


@pytest.mark.parametrize(
    "url",
    ["http://", "http:host", "https:///x/{ip}", "http://{ip}.x/", "http://h:port/", "http://h/ x"],
)
def test_a_url_that_cannot_be_asked_is_refused(url):
    with pytest.raises(ConfigError, match="TRACK_USAGE_COUNTRY must be a URL"):
        countries(url)
    with pytest.raises(ConfigError, match="TRACK_USAGE_FREEGEOIP_ENDPOINT must be a URL"):
        countries(None, use_freegeoip=True, freegeoip_endpoint=url)


@pytest.mark.parametrize("url", ["htp://h/?key=secret", "http://user:secret@/{ip}?key=secret"])
def test_a_refused_url_does_not_show_its_key(url):
    with pytest.raises(ConfigError) as caught:
        countries(url)
    assert "secret" not in str(caught.value)


def test_the_freegeoip_endpoint_is_not_looked_at_unless_it_is_used():
    assert countries(None, freegeoip_endpoint="no url").locate("8.8.8.8", (), True) == UNKNOWN


def test_a_header_without_trusted_proxies_is_refused_because_it_could_never_be_believed():
    for setting in ("header:CF-IPCountry", ["iptocc", "header:CF-IPCountry"]):
        with pytest.raises(ConfigError, match=r"COUNTRY.*TRACK_USAGE_TRUSTED_PROXIES"):
            countries(setting, trusted_proxies=False)


async def _asynchronous(address):
    return None


@pytest.mark.parametrize("function", ["DE", 5, _asynchronous])
def test_a_function_that_cannot_be_called_is_refused(function):
    with pytest.raises(ConfigError, match=r"TrackUsage\(country=\.\.\.\) must be a function"):
        countries("auto", function=function)


def test_the_codes_are_the_249_of_iso_and_kosovos():
    assert len(ISO_CODES) == 250
    assert {"US", "DE", "GB", "BQ", "SS", "XK"} <= ISO_CODES
    assert not {"EU", "XX", "ZZ", "T1", "A1", "A2", "O1", "AP", "UK", "AN"} & ISO_CODES


# -------------------------------------------------------------------------------- headers


def test_the_header_of_a_trusted_proxy_is_believed():
    cloudflare = countries("header:CF-IPCountry")
    assert cloudflare.headers == ("HTTP_CF_IPCOUNTRY",)
    assert cloudflare.locate("8.8.8.8", ("de",), True) == Answer("DE")
    assert cloudflare.locate(None, (" DE ",), True) == Answer("DE")


def test_the_header_of_anybody_else_is_not():
    assert countries("header:CF-IPCountry").locate("8.8.8.8", ("DE",), False) == UNKNOWN
    both = countries(["header:CF-IPCountry", "iptocc"])
    assert both.locate("8.8.8.8", ("DE",), False) == Answer("US")


@pytest.mark.parametrize(
    "value",
    [
        *("", "XX", "ZZ", "T1", "A1", "A2", "O1", "AP", "EU", "**", "D", "DEU", "DE,FR", "DE, DE"),
        # Whose upper() is SS, FI and IT: South Sudan, Finland and Italy.
        *("\xdf", "\ufb01", "\u0131t"),
        *("reserved", "Unknown", "country_code=", "xcountry_code=US"),
    ],
)
def test_a_header_that_names_no_country_is_unknown(value):
    assert country("header:X-Country", headers=(value,)) is None


@pytest.mark.parametrize(
    "value",
    [
        "georegion=1,country_code=US,region_code=CA,city=SANJOSE",
        "georegion=1, country_code=us",
        "country_code=US",
    ],
)
def test_the_edgescape_header_of_akamai_is_read(value):
    assert country("header:X-Akamai-Edgescape", headers=(value,)) == "US"


SOME_HEADER = countries("header:X-Country")


@given(st.text(max_size=300) | st.text("DEUScountry_=,XZ\xdf ", max_size=30))
def test_whatever_a_header_holds_the_answer_is_a_country_or_unknown(value):
    assert SOME_HEADER.locate(None, (value,), True).country in ISO_CODES | {None}


def test_the_first_source_that_knows_wins():
    some = countries(["header:A-Country", "header:B-Country", "iptocc", "header:A-Country"])
    assert some.headers == ("HTTP_A_COUNTRY", "HTTP_B_COUNTRY")
    assert some.locate("8.8.8.8", ("FR", "DE"), True).country == "FR"
    assert some.locate("8.8.8.8", ("XX", "DE"), True).country == "DE"
    assert some.locate("8.8.8.8", ("", ""), True).country == "US"
    assert some.locate(None, ("", ""), True) == UNKNOWN


# -------------------------------------------------------------------------------- iptocc


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("8.8.8.8", "US"),
        ("2a00:1450:4001::1", "IE"),
        ("127.0.0.1", None),
        ("10.0.0.1", None),
        ("::1", None),
        ("not an address", None),
        ("", None),
        (None, None),
    ],
)
def test_iptocc_knows_public_addresses(address, expected):
    assert country("iptocc", address) == expected


def test_a_source_that_raises_is_counted_and_the_next_one_is_asked(monkeypatch):
    faults = Faults()
    some = countries(["iptocc", "header:X-Country"], faults=faults)
    some._sources[0]._country_code = lambda address: 1 / 0
    assert some.locate("8.8.8.8", ("DE",), True) == Answer("DE")
    assert faults.counts() == {"country": 1}


# -------------------------------------------------------------------------------- MMDB files


def write_mmdb(
    path: Path, layout=None, ip_version=4, network="8.8.8.0/24", padding=0, kind="Country"
) -> Path:
    writer = MMDBWriter(
        ip_version=ip_version, database_type=kind, description="x" * padding or "test"
    )
    record = {"country": {"iso_code": "US"}} if layout is None else layout
    writer.insert_network(IPSet([network]), record)
    writer.to_db_file(str(path))
    return path


def iso(code):
    return {"country": {"iso_code": code, "names": {"en": "Somewhere"}}}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (iso("FR") | {"registered_country": {"iso_code": "US"}}, "FR"),
        ({"country_code": "FR"}, "FR"),
        ({"country_code": "fr", "country": "France"}, "FR"),
        ({"country": "FR"}, "FR"),
        ({"registered_country": {"iso_code": "FR"}}, "FR"),
        ({"country": {"iso_code": "EU"}, "registered_country": {"iso_code": "FR"}}, "FR"),
        ({"country": {"geoname_id": 1}, "registered_country": {"iso_code": "FR"}}, "FR"),
        ({"country": {"iso_code": ["FR"]}}, None),
        ({"country": 7, "registered_country": "FR"}, None),
        ({"city": "Paris"}, None),
        ("FR", None),
        ([iso("FR")], None),
    ],
)
def test_every_layout_of_a_database_is_read(tmp_path, layout, expected):
    path = write_mmdb(tmp_path / "country.mmdb", layout)
    database = countries(f"mmdb:{path}")
    assert database.locate("8.8.8.8", (), False).country == expected
    assert database.locate("9.9.9.9", (), False) == UNKNOWN
    assert database.locate(None, (), False) == UNKNOWN


CITY = {
    "city": {"geoname_id": 2988507, "names": {"en": "Paris"}},
    "continent": {"code": "EU"},
    "country": {"iso_code": "FR", "names": {"en": "France"}},
    "location": {"latitude": 48.8, "longitude": 2.3, "time_zone": "Europe/Paris"},
    "subdivisions": [{"iso_code": "IDF"}],
}


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        pytest.param("GeoLite2-City", CITY, id="MaxMind, DB-IP"),
        pytest.param(
            "ipinfo standard_location.mmdb",
            {"city": "Paris", "country": "FR", "lat": "48.8", "region": "Ile-de-France"},
            id="IPinfo",
        ),
        pytest.param("", {"city": "Paris", "country_code": "FR"}, id="ip-location-db"),
    ],
)
def test_the_country_of_a_city_file_is_used(tmp_path, caplog, kind, layout):
    path = write_mmdb(tmp_path / "city.mmdb", layout, kind=kind)
    assert country(f"mmdb:{path}") == "FR"
    assert caplog.records == []


@pytest.mark.parametrize(
    ("kind", "layout", "told"),
    [
        pytest.param(
            "DBIP-ASN-Lite (compat=GeoLite2-ASN)",
            {"autonomous_system_number": 15169, "autonomous_system_organization": "Google"},
            "'DBIP-ASN-Lite (compat=GeoLite2-ASN)'",
            id="networks",
        ),
        pytest.param("x\n" * 99, {"isp": "x"}, f"{('x' + chr(10)) * 32!r}", id="odd type"),
        pytest.param("", {"is_anonymous": True}, "'unknown type'", id="no type"),
    ],
)
def test_a_file_of_something_else_says_in_one_line_what_it_is(tmp_path, caplog, kind, layout, told):
    path = write_mmdb(tmp_path / "other.mmdb", layout, kind=kind)
    watched = Watched(path)
    assert [watched.country() for _ in range(3)] == [None] * 3
    assert watched.faults.counts() == {"country": 1}
    assert [record.getMessage() for record in caplog.records] == [
        f"country: the MMDB file is one of {told}, which names no countries; countries are unknown;"
        " look at TRACK_USAGE_COUNTRY and what it names"
    ]
    assert watched.a_minute_later() is None
    write_mmdb(path, iso("FR"))
    assert watched.a_minute_later() == "FR"
    assert watched.faults.counts() == {"country": 1}


def test_an_ipv6_address_is_unknown_to_a_database_without_ipv6(tmp_path):
    faults = Faults()
    database = countries(f"mmdb:{write_mmdb(tmp_path / 'country.mmdb')}", faults=faults)
    assert database.locate("2001:4860::1", (), False) == UNKNOWN
    assert faults.counts() == {}


def test_a_database_with_ipv6_is_read(tmp_path):
    path = write_mmdb(tmp_path / "country.mmdb", iso("IE"), 6, "2a00::/16")
    assert country(f"mmdb:{path}", "2a00:1450::1") == "IE"


def test_a_private_address_is_looked_up_because_the_file_is_the_owners(tmp_path):
    path = write_mmdb(tmp_path / "country.mmdb", iso("CH"), network="10.0.0.0/8")
    assert country(f"mmdb:{path}", "10.1.2.3") == "CH"


class Watched:
    """A database file and a countries that looks at it, with a clock of its own."""

    def __init__(self, path):
        self.path = path
        self.clock = Clock()
        self.faults = Faults()
        self.countries = countries(
            f"mmdb:{path}", faults=self.faults, limits=Limits(clock=self.clock)
        )

    def country(self, address="8.8.8.8"):
        return self.countries.locate(address, (), False).country

    def a_minute_later(self):
        self.clock.now += 60
        return self.country()


@pytest.fixture
def watched(tmp_path):
    return Watched(write_mmdb(tmp_path / "country.mmdb", iso("US")))


def test_a_database_replaced_by_rename_is_read_within_a_minute(watched, tmp_path):
    assert watched.country() == "US"
    write_mmdb(tmp_path / "new.mmdb", iso("FR")).replace(watched.path)
    watched.clock.now += 59
    assert watched.country() == "US"
    watched.clock.now += 1
    assert watched.country() == "FR"
    assert watched.faults.counts() == {}


def test_an_unchanged_database_is_not_read_again(watched):
    answers = watched.countries._sources[0]._answers
    assert watched.a_minute_later() == "US"
    assert watched.countries._sources[0]._answers is answers


def test_a_half_written_database_leaves_the_old_one_in_use(watched, tmp_path):
    whole = write_mmdb(tmp_path / "new.mmdb", iso("FR"), padding=5000).read_bytes()
    watched.path.write_bytes(whole[: len(whole) // 2])
    assert watched.a_minute_later() == "US"
    assert watched.faults.counts() == {"country": 1}
    watched.path.write_bytes(whole)
    assert watched.a_minute_later() == "FR"


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_bytes(b"")])
def test_a_database_that_vanished_or_is_empty_leaves_the_old_one_in_use(watched, spoil):
    spoil(watched.path)
    assert watched.a_minute_later() == "US"
    assert watched.country("8.8.8.9") == "US"
    assert watched.faults.counts() == {"country": 1}


def test_a_database_written_while_it_is_copied_is_not_used(watched, tmp_path, monkeypatch):
    new = write_mmdb(tmp_path / "new.mmdb", iso("FR"))

    def copy_and_touch(source, target, size, copy=shutil.copyfileobj):
        copy(source, target, size)
        os.utime(watched.path, ns=(1, 1))

    shutil.copy(new, watched.path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "copyfileobj", copy_and_touch)
        assert watched.a_minute_later() == "US"
    assert watched.faults.counts() == {"country": 1}
    assert watched.a_minute_later() == "FR"


@pytest.mark.parametrize("content", [None, b"", b"no database", b"\xab\xcd\xefMaxMind.com\xff"])
def test_a_database_may_be_missing_or_broken_at_first_and_arrive_later(tmp_path, content):
    path = tmp_path / "country.mmdb"
    if content is not None:
        path.write_bytes(content)
    watched = Watched(path)
    assert watched.country() is None
    assert watched.faults.counts() == {"country": 1}
    write_mmdb(path, iso("FR"))
    assert watched.a_minute_later() == "FR"


def test_a_folder_instead_of_a_database_is_reported(tmp_path):
    watched = Watched(tmp_path)
    assert watched.country() is None
    assert watched.faults.counts() == {"country": 1}


def test_a_relative_path_is_that_of_the_start(tmp_path, monkeypatch):
    write_mmdb(tmp_path / "country.mmdb", iso("US"))
    monkeypatch.chdir(tmp_path)
    watched = Watched("country.mmdb")
    monkeypatch.chdir("/")
    write_mmdb(tmp_path / "new.mmdb", iso("FR")).replace(tmp_path / "country.mmdb")
    assert watched.a_minute_later() == "FR"


OVERWRITE = """
import sys
from pathlib import Path
from flask_usage_metrics.enrich.country import make_country_lookup
from flask_usage_metrics.runtime.faults import Faults

path = Path(sys.argv[1])
countries = make_country_lookup("mmdb:" + sys.argv[1], trusted_proxies=False, use_freegeoip=False,
                       freegeoip_endpoint=None, function=None, faults=Faults())
with path.open("r+b") as file:
    file.truncate(0)
print({countries.locate(f"8.8.{a}.{b}", (), False).country for a in range(256) for b in (1, 2)})
path.write_bytes(b"something else")
print({countries.locate(f"8.8.{a}.{b}", (), False).country for a in range(256) for b in (3, 4)})
"""


def test_a_database_cut_or_overwritten_in_place_does_not_kill_the_process(tmp_path):
    path = write_mmdb(tmp_path / "country.mmdb", iso("US"), network="8.0.0.0/8", padding=50_000)
    done = run_python(OVERWRITE, str(path))
    assert (done.returncode, done.stdout.split()) == (0, ["{'US'}", "{'US'}"]), done.stderr


def test_the_copy_leaves_no_file_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "broken.mmdb").write_bytes(b"broken")
    path = write_mmdb(tmp_path / "country.mmdb")
    countries([f"mmdb:{path}", f"mmdb:{tmp_path / 'broken.mmdb'}"])
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="Linux only")
def test_a_database_is_read_without_a_folder_for_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    faults = Faults()
    path = write_mmdb(tmp_path / "country.mmdb")
    assert countries(f"mmdb:{path}", faults=faults).locate("8.8.8.8", (), True).country == "US"
    assert faults.counts() == {}


def test_the_slow_decoder_is_warned_of_once(tmp_path, monkeypatch, caplog):
    import maxminddb

    opened = maxminddb.open_database
    mmdb._warn_of_decoder.cache_clear()
    monkeypatch.setattr(maxminddb, "open_database", lambda name: opened(name, maxminddb.MODE_MMAP))
    watched = Watched(write_mmdb(tmp_path / "country.mmdb"))
    write_mmdb(tmp_path / "new.mmdb", iso("FR")).replace(watched.path)
    assert watched.a_minute_later() == "FR"
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_damage_inside_a_database_makes_unknown_and_is_counted(tmp_path):
    path = write_mmdb(tmp_path / "country.mmdb", iso("US"))
    content = bytearray(path.read_bytes())
    at = content.index(b"iso_code") - 1
    content[at] = 0xFF
    path.write_bytes(content)
    watched = Watched(path)
    assert watched.country() is None
    assert watched.faults.counts() == {"country": 1}


def test_countries_kept_of_a_database_are_bounded(tmp_path):
    watched = Watched(write_mmdb(tmp_path / "country.mmdb", iso("US"), network="8.0.0.0/8"))
    for number in range(20_000):
        assert watched.country(f"8.0.{number >> 8}.{number & 255}") == "US"
    answers = watched.countries._sources[0]._answers
    assert len(answers) + len(answers._older) <= 8192
