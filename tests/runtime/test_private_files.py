"""Folders and files that only this user may write."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.watch import descriptors

from flask_usage_metrics.runtime.private_files import (
    StateUnavailable,
    check_private,
    make_private,
    open_existing,
    open_private,
)

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


@as_root
@pytest.mark.parametrize("open_it", [open_private, open_existing])
def test_a_strangers_file_is_not_opened(tmp_path: Path, open_it: Callable[[Path], int]) -> None:
    path = tmp_path / "file"
    path.write_text("")
    os.chown(path, STRANGER, STRANGER)
    with pytest.raises(PermissionError):
        open_it(path)
    assert descriptors(tmp_path) == 0


@pytest.mark.parametrize("open_it", [open_private, open_existing])
def test_a_link_is_not_followed(tmp_path: Path, open_it: Callable[[Path], int]) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OSError, match="symbolic link"):
        open_it(tmp_path / "link")
    assert descriptors(tmp_path) == 0


@pytest.mark.parametrize("access", [os.O_RDWR, os.O_RDONLY])
def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path: Path, access: int) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(PermissionError):
        open_existing(tmp_path / "pipe", access)
    assert descriptors(tmp_path) == 0


def test_what_does_not_exist_is_made_only_when_it_may_be(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_existing(tmp_path / "file")
    os.close(open_private(tmp_path / "file", exclusive=True))
    with pytest.raises(FileExistsError):
        open_private(tmp_path / "file", exclusive=True)
    os.close(open_existing(tmp_path / "file"))


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
