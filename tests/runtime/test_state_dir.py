"""The state directory is ours alone: nothing planted is used, nothing foreign is touched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.front_door import Site, samples
from helpers.process import Process, run_python, start_python
from helpers.watch import descriptors

from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
    check_private,
    make_private,
    open_private,
)
from flask_usage_metrics.runtime.processes import is_alive, process_key, server_key, started
from flask_usage_metrics.runtime.server_runs import ServerRun, dead_runs, remove_run
from flask_usage_metrics.runtime.state_dir import StateDir, default_places

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


def ended() -> tuple[int, str]:
    """Return the number of a process that ended, and when it had started."""
    with Process("sleep", "60") as process:
        since = started(process.pid)
    return process.pid, since


def release(home: Path, key: str, starter: str) -> Path:
    """Make a run without members."""
    run = ServerRun(home, key, os.getpid())
    run.join()
    run.release()
    (run.folder / "lock").write_text(starter)
    return run.folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return StateDir([tmp_path / "place"], "shop").home()


def dead(home: Path, own: Path | None = None) -> list[Path]:
    return list(dead_runs([home], own or home / "none"))


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
    assert dead(home) == []
    assert target.read_text() == "precious"


@as_root
def test_a_strangers_file_is_not_opened(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("")
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(PermissionError):
        open_private(path)
    assert descriptors(tmp_path) == 0


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


def test_dead_generations_are_found_and_removed(home: Path) -> None:
    pid, since = ended()
    folder = release(home, "dead", f"{pid} {since}\n")
    for name in ("totals.sqlite3", "totals.sqlite3-wal", "totals.sqlite3-shm"):
        (folder / name).write_text("")
    assert dead(home) == [folder]
    remove_run(folder)
    assert not folder.exists()
    assert dead(home) == []


def test_a_number_that_was_given_again_keeps_no_generation_alive(home: Path) -> None:
    folder = release(home, "again", f"{os.getpid()} 1\n")
    assert not is_alive(os.getpid(), "1")
    assert dead(home) == [folder]


@pytest.mark.parametrize("who", ["member", "starter"])
def test_a_living_generation_is_not_removed(home: Path, who: str) -> None:
    pid, since = ended()
    if who == "starter":
        pid, since = os.getppid(), started(os.getppid())
    folder = release(home, "living", f"{pid} {since}\n")
    script = (
        "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH);"
        "print('ready', flush=True); sys.stdin.read()"
    )
    with start_python(script, folder / "lock" if who == "member" else __file__) as member:
        assert member.line() == "ready"
        assert dead(home) == []
        remove_run(folder)
        assert (folder / "lock").exists()
    if who == "member":
        assert dead(home) == [folder]
        remove_run(folder)
        assert not folder.exists()


def test_the_own_generation_is_never_dead(home: Path) -> None:
    own = ServerRun(home, "own", os.getpid())
    own.join()
    assert dead(home) == []
    own.release()
    assert dead(home, own.folder) == []
    own.join()
    own.end()
    assert not own.folder.exists()


def test_a_generation_with_a_journal_is_kept(home: Path) -> None:
    pid, since = ended()
    folder = release(home, "left", f"{pid} {since}\n")
    (folder / f"{'a' * 16}.journal").write_text("")
    remove_run(folder)
    assert dead(home) == [folder]


def test_foreign_files_are_neither_read_nor_removed(home: Path) -> None:
    pid, since = ended()
    folder = release(home, "foreign", f"{pid} {since}\n")
    foreign = [folder / "notes.txt", home / "notes.txt", home.parent / "notes.txt"]
    strange = [home / "g-xyz", home / "other", folder / "sub"]
    for directory in strange:
        directory.mkdir(mode=0o700)
        foreign.append(directory / "lock")
    for path in foreign:
        path.write_text("precious")
        path.chmod(0o000)
    assert dead(home) == [folder]
    remove_run(folder)
    for path in foreign:
        path.chmod(0o600)
        assert path.read_text() == "precious"
    assert dead(home) == []


def test_who_joins_while_it_is_removed_finds_a_new_one(home: Path) -> None:
    first = ServerRun(home, "key", 1)
    first.join()
    inode = (first.folder / "lock").stat().st_ino
    first.release()
    shutil.rmtree(first.folder)
    (home / "other").write_text("")  # so that the inode is not used again
    first.join()
    assert (first.folder / "lock").exists()
    assert inode
    first.release()


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


def test_folders_are_checked_each_time(tmp_path: Path) -> None:
    folder = make_private(tmp_path / "a")
    check_private(folder)
    folder.chmod(0o702)
    with pytest.raises(StateUnavailable, match="other users"):
        make_private(folder)
    folder.chmod(0o755)  # others may look: the files in it are not for them
    check_private(folder)
    with pytest.raises(StateUnavailable):
        check_private(tmp_path / "missing")
