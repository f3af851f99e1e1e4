import errno
import logging
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from helpers.front_door import Site

from flask_usage_metrics import UsageRecord
from flask_usage_metrics.errors import RecordsRejected, StorageError, StorageUnavailable
from flask_usage_metrics.runtime.faults import Faults, reason_of
from flask_usage_metrics.runtime.private_files import StateUnavailable
from flask_usage_metrics.storage import Writer


def test_what_a_block_raises_is_counted_and_goes_no_further() -> None:
    faults = Faults()
    with faults.caught("part", "so what"):
        raise ValueError("a secret")
    with faults.caught("part", "so what"):
        pass
    assert faults.counts() == {"part": 1}


def test_an_exit_is_caught_only_where_it_is_asked_for() -> None:
    faults = Faults()
    with pytest.raises(SystemExit), faults.caught("part", "so what"):
        raise SystemExit
    assert faults.counts() == {}
    with faults.caught("part", "so what", BaseException):
        raise SystemExit
    assert faults.counts() == {"part": 1}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ValueError("s3cret"), "ValueError"),
        (OSError("s3cret"), "OSError"),
        (OSError(errno.ENOSPC, "s3cret", "/s3cret"), "OSError (No space left on device)"),
        (OSError(10**30, "s3cret"), "OSError"),
        (OSError(-2, "s3cret"), "OSError"),
        (PermissionError(errno.EACCES, "s3cret"), "PermissionError (Permission denied)"),
        (StorageUnavailable("s3cret"), "StorageUnavailable"),
        (StorageUnavailable(reason="it is full"), "StorageUnavailable (it is full)"),
        (StorageUnavailable("s3cret", reason="full"), "StorageUnavailable (full)"),
        (StorageError(reason="too large"), "StorageError (too large)"),
        (RecordsRejected([1], "DataError"), "RecordsRejected (DataError)"),
        (StateUnavailable("it is a link"), "StateUnavailable (it is a link)"),
    ],
)
def test_a_reason_is_told_without_the_exceptions_own_text(
    error: BaseException, reason: str
) -> None:
    assert reason_of(error) == reason


def test_of_sqlites_errors_the_name_is_the_reason() -> None:
    connection = sqlite3.connect(":memory:")
    with pytest.raises(sqlite3.Error) as caught:
        connection.execute("SELECT s3cret")
    connection.close()
    assert reason_of(caught.value) in (
        "OperationalError (SQLITE_ERROR)",
        "OperationalError",  # before CPython 3.11
    )


def test_why_and_what_to_do_are_in_the_line(caplog: pytest.LogCaptureFixture) -> None:
    faults = Faults()
    full = OSError(errno.ENOSPC, "s3cret")
    faults.report("totals", full, "workers are added together later")
    faults.report("totals", full, "workers are added together later")
    faults.report("no part of ours", "something", "so what")
    assert caplog.messages == [
        "totals: OSError (No space left on device); workers are added together later; "
        "look at the disk and the rights of TRACK_USAGE_STATE_DIR",
        "no part of ours: something; so what",
    ]


def test_reasons_that_never_repeat_fill_no_memory() -> None:
    faults = Faults()
    logging.disable(logging.CRITICAL)
    try:
        for number in range(5000):
            faults.report("sink x", StorageUnavailable(reason=f"{number}"), "so what")
    finally:
        logging.disable(logging.NOTSET)
    assert faults.counts() == {"sink x": 5000}
    assert len(faults._logged_at) <= 1000


class Mine(Writer):
    """A storage of the app's, which tells why it is down."""

    def write(self, batch: Sequence[UsageRecord]) -> None:
        raise StorageUnavailable("s3cret", reason="the queue is full")


def test_the_line_of_a_storage_that_cannot_be_written_says_why_and_names_the_setting(
    make_site: Callable[..., Site], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "folder.sqlite3").mkdir()
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "text.sqlite3").write_bytes(b"no database" * 1000)
    urls = ["sqlite", "jsonl"]
    site = make_site(
        [
            *(f"{kind}:///{tmp_path}/folder.{kind.replace('sqlite', 'sqlite3')}" for kind in urls),
            f"sqlite:///{tmp_path}/text.sqlite3",
            Mine(),
        ]
    )
    site.get("/")
    site.usage.flush(0.5)
    lines = [line for line in caplog.messages if line.startswith("sink ")]
    for why in (
        "sink sqlite: StorageUnavailable (sqlite: ",
        "sink jsonl: StorageUnavailable (jsonl: Is a directory); its records wait",
        "(sqlite: file is not a database)",
        "sink mine: StorageUnavailable (the queue is full); its records wait",
    ):
        assert any(why in line for line in lines), (why, lines)
    assert all("TRACK_USAGE_STORAGE" in line for line in lines)
    assert str(tmp_path) not in caplog.text
    assert "s3cret" not in caplog.text
