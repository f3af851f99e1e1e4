"""The state directory is ours alone: nothing planted is used, nothing foreign is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.front_door import Site, samples
from helpers.process import run_python

from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
)
from flask_usage_metrics.runtime.processes import process_key, server_key
from flask_usage_metrics.runtime.server_runs import ServerRun, dead_runs, remove_run
from flask_usage_metrics.runtime.state_dir import StateDir, default_places

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
    folder = {"place": place, "home": home, "run": ServerRun(home, "key", 1).folder}[where]
    shutil.rmtree(folder, ignore_errors=True)
    plant(folder)
    with pytest.raises(StateUnavailable) as caught:
        ServerRun(state.home(), "key", 1).join()
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
    run = ServerRun(home, "key", 1)
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


def test_no_instance_folder_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    temporary = tmp_path / "tmp" / f"flask-usage-metrics-{os.getuid()}"
    instance = tmp_path / "instance"
    assert default_places(instance) == [temporary]
    instance.mkdir()
    assert default_places(instance) == [instance / "usage-state", temporary]


# ------------------------------------------------------------------------ runs


def test_keys_and_apps_are_separate(tmp_path: Path, home: Path) -> None:
    assert ServerRun(home, "one", 1).folder != ServerRun(home, "two", 1).folder
    assert ServerRun(home, "one", 1).folder == ServerRun(home, "one", 2).folder
    homes = {
        StateDir([tmp_path / "place"], app).home() for app in ("shop", "shop!", "/", "é", "\0")
    }
    assert len(homes) == 5
    assert all(path.parent == tmp_path / "place" for path in homes)
    assert server_key() == server_key()
    assert server_key() != process_key()
    code = (
        "from flask_usage_metrics.runtime.processes import process_key, server_key\n"
        "print(server_key())\nprint(process_key())"
    )
    keys = [
        run_python(code, start_new_session=session).stdout.splitlines()
        for session in (False, False, True)
    ]
    assert keys[0][0] == keys[1][0]  # children of one parent
    assert keys[0][0] != keys[2][0]  # but in a process group of its own
    assert len({key[1] for key in keys}) == 3
