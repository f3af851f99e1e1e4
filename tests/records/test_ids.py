"""Ids and times of records, which are made of many requests at once."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from uuid import RFC_4122, UUID

import pytest
from helpers.front_door import Site
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.enrich.enricher import _moments
from flask_usage_metrics.records.ids import NUMBER_BITS, record_ids

LATEST_NS = 2**48 * 1_000_000 - 1
NUMBERS = st.integers(0, 2**NUMBER_BITS - 1)
PAIRS = st.lists(st.tuples(st.integers(0, LATEST_NS), NUMBERS), max_size=70)
EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


@given(PAIRS)
def test_an_id_holds_time_and_number(pairs: list[tuple[int, int]]) -> None:
    ids = record_ids([started for started, _ in pairs], [number for _, number in pairs])
    for text, (started_ns, number) in zip(ids, pairs, strict=True):
        uuid = UUID(text)
        assert str(uuid) == text
        assert (uuid.version, uuid.variant) == (7, RFC_4122)
        milliseconds, rest = divmod(started_ns, 1_000_000)
        assert uuid.int >> 80 == milliseconds
        assert uuid.int >> 64 & 0xFFF == rest * 4096 // 1_000_000
        assert uuid.int & (2**62 - 1) == number


@given(PAIRS)
def test_ids_sort_as_their_requests_do(pairs: list[tuple[int, int]]) -> None:
    pairs.sort(key=lambda pair: (pair[0] * 4096 // 1_000_000, pair[1]))
    ids = record_ids([started for started, _ in pairs], [number for _, number in pairs])
    assert ids == sorted(ids)


@given(st.lists(st.tuples(st.integers(-(2**63), 2**64), st.integers(0, 2**64)), max_size=9))
def test_what_is_far_off_is_brought_in_and_changes_no_other(pairs: list[tuple[int, int]]) -> None:
    known = (1_795_300_000_123_456_789, 5)
    (expected,) = record_ids([known[0]], [known[1]])
    mixed = [*pairs, known]
    ids = record_ids([started for started, _ in mixed], [number for _, number in mixed])
    assert ids[-1] == expected
    assert all(str(UUID(text)) == text for text in ids)
    moments = _moments([started for started, _ in mixed])
    assert moments[-1] == datetime(2026, 11, 21, 22, 26, 40, 123456, timezone.utc)
    assert len(moments) == len(mixed)


@given(st.lists(st.integers(0, 4_102_444_800 * 10**9 - 1), max_size=20))
def test_moments_are_exact_to_the_microsecond(started_ns: list[int]) -> None:
    expected = [EPOCH + timedelta(microseconds=moment // 1000) for moment in started_ns]
    assert _moments(started_ns) == expected


@pytest.mark.parametrize("clock", [0, 2**63 - 1])
def test_a_clock_that_is_far_off_loses_no_record(
    make_site: Callable[..., Site], monkeypatch: pytest.MonkeyPatch, clock: int
) -> None:
    site = make_site()
    site.app.add_url_rule("/", "index", lambda: "hello")
    site.get()
    monkeypatch.setattr("flask_usage_metrics.capture.exchange.time_ns", lambda: clock)
    site.get()
    monkeypatch.undo()
    site.get()
    assert len({record.id for record in site.records()}) == 3
    site.assert_agrees()
