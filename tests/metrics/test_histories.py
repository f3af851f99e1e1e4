"""Who knows more of a history has the difference to add, once, and no sum falls by it."""

from __future__ import annotations

from flask_usage_metrics.metrics.histories import histories_of, missing, with_more
from flask_usage_metrics.metrics.totals_tables import MOST_BRANCHES, Branch, State

A = ("requests", ("GET", "a"))
B = ("requests", ("GET", "b"))


def test_the_history_that_goes_on_has_what_the_lost_ones_have_not() -> None:
    lost = {b"lost": Branch(3, {A: [5, 0.5]})}
    found = histories_of(State(b"now", 7), {A: [6, 0.75], B: [1, 0.25]}, lost)
    assert found == {**lost, b"now": Branch(7, {A: [1, 0.25], B: [1, 0.25]})}


def test_seconds_that_were_rounded_are_never_less_than_none() -> None:
    lost = {b"lost": Branch(3, {A: [2, 0.1 + 0.2]})}
    assert histories_of(State(b"now", 7), {A: [2, 0.3]}, lost)[b"now"].sums == {}
    more = {b"other": Branch(2, {A: [2, 0.3]})}
    theirs = {b"other": Branch(1, {A: [2, 0.1 + 0.2]})}
    assert with_more({A: [9, 1.0]}, more, theirs) == {A: [9, 1.0]}


def test_only_of_what_one_knows_more_the_difference_is_added() -> None:
    mine = {b"more": Branch(4, {A: [5]}), b"less": Branch(1, {A: [9]}), b"new": Branch(1, {B: [2]})}
    theirs = {b"more": Branch(3, {A: [3]}), b"less": Branch(2, {A: [10]}), b"now": Branch(9, {})}
    more = missing(mine, theirs)
    assert more.keys() == {b"more", b"new"}
    assert with_more({A: [13]}, more, theirs) == {A: [15], B: [2]}
    assert missing(mine, {**theirs, **more}) == {}


def test_what_may_have_been_forgotten_is_not_added_again() -> None:
    mine = {b"mine": Branch(1, {A: [1]})}
    lost = {bytes([number]): Branch(1, {A: [1]}) for number in range(MOST_BRANCHES)}
    few = dict([*lost.items()][1:])
    assert missing(mine, {**few, b"now": Branch(1, {})}) == mine
    assert missing(mine, {**lost, b"now": Branch(1, {})}) == {}
