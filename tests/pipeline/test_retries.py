"""Pauses between the attempts at a batch grow, within bounds, and begin anew."""

from __future__ import annotations

from flask_usage_metrics.pipeline.delivery.retries import ATTEMPTS, Backoff


def test_pauses_double_up_to_half_a_minute_give_or_take_a_fifth() -> None:
    backoff = Backoff()
    for expected in (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30, 30):
        assert 0.8 * expected <= backoff.next_pause() <= 1.2 * expected


def test_the_last_attempt_comes_after_all_others_failed() -> None:
    backoff = Backoff()
    told = []
    for _ in range(ATTEMPTS):
        told.append(backoff.is_last_attempt())
        backoff.next_pause()
    assert told == [False] * (ATTEMPTS - 1) + [True]


def test_what_is_decided_begins_anew() -> None:
    backoff = Backoff()
    for _ in range(ATTEMPTS):
        backoff.next_pause()
    backoff.reset()
    assert not backoff.is_last_attempt()
    assert backoff.next_pause() <= 0.06
