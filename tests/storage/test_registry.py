"""Storages that other distributions register, installed as pip does: with a dist-info folder."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.front_door import Site
from helpers.process import run_python
from helpers.records import make_record

from flask_usage_metrics import ConfigError, open_storage
from flask_usage_metrics.storage import Storage, as_writer
from flask_usage_metrics.storage.sql import SQLStorage

URL = "nosql://me:s3cret@db/x"
MODULE = """
from flask_usage_metrics import ConfigError
from flask_usage_metrics.storage import Storage, Writer

class NoSQL(Storage):
    name = "nosql"

    def set_up(self, url):
        self.url = url
        self.kept = []

    def write(self, batch):
        self.kept.extend(batch)

def make(url):
    return NoSQL(url)

def refuse(url):
    raise ConfigError("nosql:// needs a host")

def fail(url):
    raise ValueError(f"cannot parse {url}")

def nothing(url):
    pass

number = 5
"""

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Return a function that installs a distribution with these entry points, a line each."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "nosql_storage.py").write_text(MODULE)
    (tmp_path / "broken_storage.py").write_text("import a_driver_that_there_is_not\n")

    def install(*lines: str, name: str = "nosql-storage") -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        group = "[flask_usage_metrics.storages]"
        (folder / "entry_points.txt").write_text("\n".join([group, *lines, ""]))

    yield install
    sys.modules.pop("nosql_storage", None)


@pytest.mark.parametrize("entry_point", ["make", "NoSQL"])
def test_a_distribution_registers_a_storage(install: Install, entry_point: str) -> None:
    install(f"nosql = nosql_storage:{entry_point}")
    for storage in (open_storage(URL), as_writer(URL, "storage")):
        assert isinstance(storage, Storage)
        assert (storage.name, storage.url) == ("nosql", URL)  # type: ignore[attr-defined]


def test_an_app_may_be_given_it_by_its_setting(
    install: Install, make_site: Callable[..., Site]
) -> None:
    install("nosql = nosql_storage:make")
    site = make_site(STORAGE=[URL, "print:"])
    site.get("/")
    assert site.usage.flush()
    kept = site.usage.storage.kept  # type: ignore[attr-defined]
    assert [record.status for record in kept] == [404]


def test_a_driver_may_follow_the_scheme(install: Install) -> None:
    install("nosql = nosql_storage:make", "NoSQL+tls = nosql_storage:NoSQL")
    for scheme in ("nosql", "NOSQL", "nosql+other", "nosql+tls", "nosql+TLS"):
        assert open_storage(f"{scheme}://db").url == f"{scheme}://db"  # type: ignore[attr-defined]


@pytest.mark.parametrize("url", ["print+x:", "jsonl+x:///records.jsonl"])
def test_no_driver_may_follow_the_scheme_of_a_built_in_storage_that_has_none(
    install: Install, url: str
) -> None:
    install("jsonl = nosql_storage:make", "print+x = nosql_storage:make")
    scheme = url.partition(":")[0]
    with pytest.raises(ConfigError, match=f"of kind '{re.escape(scheme)}' is not supported: "):
        open_storage(url)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (
            "broken_storage:make",
            "cannot be imported: ModuleNotFoundError: No module named 'a_driver_that_there_is_not'",
        ),
        ("nowhere_at_all:make", "cannot be imported: ModuleNotFoundError: .*'nowhere_at_all'"),
        ("nosql_storage:other", "cannot be imported: AttributeError: .*'other'"),
        ("nosql_storage:number", "must be a callable that takes a URL, not int"),
        ("nosql_storage:nothing", "must return a Writer, not NoneType"),
        ("nosql_storage:fail", "raised ValueError"),
    ],
)
def test_a_broken_one_is_one_clear_error_and_harms_no_other(
    install: Install, value: str, reason: str
) -> None:
    install(f"nosql = {value}", "fine = nosql_storage:make")
    where = f"the storage of nosql-storage's entry point nosql = {value}"
    with pytest.raises(ConfigError, match=f"^storage URL: {where} {reason}$") as caught:
        open_storage(URL)
    assert "s3cret" not in "".join(traceback.format_exception(caught.value))
    assert open_storage("fine://db").name == "nosql"


def test_what_it_says_of_the_url_is_said_with_the_setting(install: Install) -> None:
    install("nosql = nosql_storage:refuse")
    with pytest.raises(ConfigError, match=r"^TRACK_USAGE_STORAGE: nosql:// needs a host$"):
        as_writer(URL, "TRACK_USAGE_STORAGE")


def test_an_unknown_scheme_is_told_the_known_ones(install: Install) -> None:
    install("nosql = nosql_storage:make", "broken = broken_storage:make")
    install("another = broken_storage:make", name="another-storage")
    with pytest.raises(
        ConfigError,
        match=r"^storage URL of kind 'mongodb' is not supported: expected sqlite:///file, .* "
        r"or print:; installed besides: another, broken, nosql$",
    ):
        open_storage("mongodb://me:s3cret@db/x")


def test_no_distribution_takes_over_a_built_in_scheme(install: Install, tmp_path: Path) -> None:
    install(
        "sqlite = nosql_storage:make",
        "sqlite+other = nosql_storage:make",
        "print = nosql_storage:make",
    )
    storage = open_storage(f"sqlite:///{tmp_path}/usage.sqlite3")
    assert type(storage) is SQLStorage
    storage.write([make_record()])
    storage.close()
    with pytest.raises(ConfigError, match=r"^storage URL: sqlite\+other is not supported"):
        open_storage("sqlite+other:///x")
    with pytest.raises(ConfigError, match=r"or print:$"):
        open_storage("mongodb://db")


def test_two_that_register_one_scheme_are_both_refused(install: Install) -> None:
    install("nosql = nosql_storage:make", "fine = nosql_storage:make")
    install("nosql = nosql_storage:NoSQL", name="other-storage")
    with pytest.raises(ConfigError, match="registered by several distributions: ") as caught:
        open_storage(URL)
    assert "nosql-storage's entry point nosql = nosql_storage:make" in str(caught.value)
    assert "other-storage's entry point nosql = nosql_storage:NoSQL" in str(caught.value)
    assert open_storage("fine://db").name == "nosql"


def test_metadata_that_cannot_be_read_is_said(install: Install) -> None:
    install("nosql: this is no entry point")
    with pytest.raises(ConfigError, match="entry points of the installed distributions cannot be"):
        open_storage(URL)
    open_storage("print:")


def test_built_in_storages_cost_no_look_at_what_is_installed() -> None:
    code = (
        "import sys, importlib.metadata as metadata\n"
        "from flask_usage_metrics.storage import open_storage\n"
        "def refused(**arguments): raise AssertionError\n"
        "metadata.entry_points = refused\n"
        "for url in ('print:', 'jsonl:///x'): open_storage(url)\n"
        "assert 'sqlalchemy' not in sys.modules\n"
        "open_storage('sqlite://').close()\n"
    )
    assert run_python(code, fresh=True) == (0, "", "")
