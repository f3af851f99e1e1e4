"""How a thread that computes yields the interpreter lock."""

from __future__ import annotations

from datetime import timedelta

import pytest
from helpers.records import make_record

from flask_usage_metrics.runtime import gil
from flask_usage_metrics.storage.sql.table import COLUMN_NAMES, to_columns


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the pauses that were made; none of them lasts."""
    made: list[float] = []
    monkeypatch.setattr(gil, "sleep", made.append)
    monkeypatch.setattr(gil, "perf_counter", lambda: 0.0)
    return made


def test_steps_hold_everything_with_pauses_in_between(pauses: list[float]) -> None:
    yielder = gil.GilYielder()
    steps = [*yielder.steps(range(10), 4)]
    assert [[*step] for step in steps] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(pauses) == 2
    assert [*yielder.steps([], 4)] == []
    assert [*yielder.steps("abcd", 4)] == ["abcd"]
    assert len(pauses) == 2


def test_after_a_long_pause_there_are_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.001, 0.001, 0.005]
    now = 0.0

    def sleep(_: float) -> None:
        nonlocal now
        now += seconds.pop(0)

    monkeypatch.setattr(gil, "sleep", sleep)
    monkeypatch.setattr(gil, "perf_counter", lambda: now)
    yielder = gil.GilYielder()
    assert [*yielder.steps(range(6), 1)] == [range(number, number + 1) for number in range(6)]
    assert [*yielder.steps(range(6), 3)] == [range(3), range(3, 6)]
    assert seconds == []
    with pytest.raises(IndexError):
        [*gil.GilYielder().steps(range(2), 1)]


def test_rows_are_the_same_however_many_there_are(pauses: list[float]) -> None:
    first = make_record()
    batch = [
        make_record(
            id=f"{number:08}",
            path=f"/{number}",
            view_args=None if number % 3 else {"number": number},
            started_at=first.started_at + timedelta(microseconds=number + 1),
        )
        for number in range(300)
    ]
    alone = [to_columns([record]) for record in batch]
    assert not pauses
    expected = [
        [value for columns in alone for value in columns[place]]
        for place in range(len(COLUMN_NAMES))
    ]
    assert [[*column] for column in to_columns(batch)] == expected
    assert pauses
