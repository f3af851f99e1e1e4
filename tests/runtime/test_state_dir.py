"""The state directory is ours alone: nothing planted is used, nothing foreign is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.front_door import Site, samples

from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
)
from flask_usage_metrics.runtime.run_notes import RunNote
from flask_usage_metrics.runtime.server_runs import ServerRun, dead_runs, join_run, remove_run
from flask_usage_metrics.runtime.servers import Server
from flask_usage_metrics.runtime.state_dir import StateDir, default_place

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return StateDir([tmp_path / "place"], "shop").home()


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


# ------------------------------------------------------------------------ ours alone


def plant_link(folder: Path) -> None:
    target = folder.with_name("target")
    target.mkdir()
    folder.symlink_to(target)


def plant_file(folder: Path) -> None:
    folder.write_text("x")


def plant_strangers(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    os.chown(folder, STRANGER, STRANGER)


def plant_open(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o777)


def plant_group(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o770)


PLANTS = [
    pytest.param(plant_link, id="link"),
    pytest.param(plant_file, id="file"),
    pytest.param(plant_strangers, id="strangers", marks=as_root),
    pytest.param(plant_open, id="world-writable"),
    pytest.param(plant_group, id="group-writable"),
]


@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("where", ["place", "home", "run"])
def test_what_is_planted_is_not_used(
    tmp_path: Path, plant: Callable[[Path], None], where: str
) -> None:
    place = tmp_path / "place"
    state = StateDir([place], "shop")
    home = state.home()
    server = Server(frozenset(["a"]), 1)
    run = join_run(state, server, "key")
    run.release()
    folder = {"place": place, "home": home, "run": run.folder}[where]
    shutil.rmtree(folder, ignore_errors=True)
    plant(folder)
    with pytest.raises(StateUnavailable) as caught:
        join_run(state, server, "key")
    assert str(tmp_path) not in str(caught.value)
    if where != "run":
        assert list(state.homes()) == []
    assert not list(tmp_path.glob("**/lock"))


@pytest.mark.parametrize("plant", PLANTS)
def test_the_next_place_is_taken_instead(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    plant(first)
    state = StateDir([first, second], "shop")
    assert state.home().parent == second
    assert list(state.homes()) == [state.home()]


@pytest.mark.parametrize("plant", PLANTS)
def test_a_planted_place_harms_no_request(
    tmp_path: Path, make_site: Callable[..., Site], plant: Callable[[Path], None]
) -> None:
    place = tmp_path / "planted"
    plant(place)
    site = make_site(STATE_DIR=place)
    assert site.get("/nowhere").status_code == 404
    assert len(site.records()) == 1
    assert samples(site.scrape(), "flask_usage_journaled") == {(): 0}
    assert site.faults()["state"] == 1
    assert not (tmp_path / "target").exists() or not list((tmp_path / "target").iterdir())


def test_a_planted_lock_is_not_followed(tmp_path: Path, home: Path) -> None:
    run = ServerRun(home / f"g-{'0' * 16}", RunNote())
    run.folder.mkdir(mode=0o700)
    target = tmp_path / "target"
    target.write_text("precious")
    (run.folder / "lock").symlink_to(target)
    with pytest.raises(OSError, match="symbolic links"):
        run.join()
    remove_run(run.folder)
    assert list(dead_runs([home], home / "none")) == []
    assert target.read_text() == "precious"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_all_that_is_made_is_for_its_owner_only(
    tmp_path: Path, make_site: Callable[..., Site], umask: int
) -> None:
    place = tmp_path / "deep" / "place"
    old = os.umask(umask)
    try:
        for many in (False, True):
            site = make_site(STATE_DIR=place)
            site.get("/nowhere", environ_overrides={"wsgi.multiprocess": many})
            site.scrape()
            made = [place, *place.glob("**/*")]
            assert {mode(path) for path in made if path.is_dir()} == {0o700}
            assert {mode(path) for path in made if path.is_file()} == {0o600}
        assert any(path.name == "totals.sqlite3" for path in made)
    finally:
        os.umask(old)


def test_nothing_is_made_before_the_first_request(
    tmp_path: Path, make_site: Callable[..., Site]
) -> None:
    place = tmp_path / "place"
    site = make_site(STATE_DIR=place)
    site.app.add_url_rule("/", "index", lambda: "x")
    assert not place.exists()
    site.get()
    (journal,) = place.glob("*/g-*/*.journal")
    site.close()
    assert not journal.exists()
    assert not list(place.glob("*/g-*"))  # a process of its own leaves nothing


def test_the_place_does_not_depend_on_what_exists_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    temporary = tmp_path / "tmp" / f"flask-usage-metrics-{os.getuid()}"
    instance = tmp_path / "instance"
    state = StateDir([default_place(instance)], "shop", or_temporary=True)
    before = state.places
    instance.mkdir()
    assert before == state.places == (instance / "usage-state", temporary)


@as_root
def test_a_worker_of_another_user_has_a_place_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    state = StateDir([default_place(tmp_path / "file")], "shop", or_temporary=True)
    assert state.home().parent == tmp_path / f"flask-usage-metrics-{os.getuid()}"
    monkeypatch.setattr("os.geteuid", lambda: STRANGER)  # set-up is not told of it
    assert state.places[1] == tmp_path / f"flask-usage-metrics-{STRANGER}"


# ------------------------------------------------------------------------ runs


def test_apps_are_separate(tmp_path: Path) -> None:
    homes = {
        StateDir([tmp_path / "place"], app).home() for app in ("shop", "shop!", "/", "é", "\0")
    }
    assert len(homes) == 5
    assert all(path.parent == tmp_path / "place" for path in homes)
