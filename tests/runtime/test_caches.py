"""What is remembered of strangers' texts is right, and bounded whatever they send."""

from __future__ import annotations

import weakref
from itertools import count
from threading import Thread

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.runtime.caches import ExpiringCache, TwoGenerationCache


class Maker:
    def __init__(self, most: int = 8, longest: int = 10) -> None:
        self.made: list[str] = []
        self.memory: TwoGenerationCache[str, str | None] = TwoGenerationCache(
            self.make, len, most=most, longest=longest
        )

    def make(self, text: str) -> str | None:
        self.made.append(text)
        return text.upper() or None


def test_what_is_known_is_not_made_again() -> None:
    maker = Maker()
    assert [maker.memory[text] for text in ("a", "", "a", "b", "")] == ["A", None, "A", "B", None]
    assert maker.made == ["a", "", "b"]


def test_what_is_long_is_made_each_time() -> None:
    maker = Maker()
    for _ in range(3):
        assert maker.memory["x" * 11] == "X" * 11
        assert maker.memory["y" * 10] == "Y" * 10
    assert maker.made == ["x" * 11, "y" * 10, "x" * 11, "x" * 11]


def test_the_latest_are_kept() -> None:
    maker = Maker()
    for number in range(1000):
        assert maker.memory["often"] == "OFTEN"
        assert maker.memory[str(number)] == str(number)
    assert maker.made.count("often") == 1
    made = len(maker.made)
    for number in range(996, 1000):
        assert maker.memory[str(number)] == str(number)
    assert len(maker.made) == made


class Value:
    """May be referred to weakly."""


def test_never_more_are_kept_than_there_may_be() -> None:
    alive: weakref.WeakSet[Value] = weakref.WeakSet()

    def make(_text: str) -> Value:
        value = Value()
        alive.add(value)
        return value

    memory = TwoGenerationCache(make, len, most=8, longest=10)
    for number in range(1000):
        memory[str(number)]
        memory[str(number // 3)]
        assert len(alive) <= 8
    for number in range(1000):
        memory[f"much too long {number}"]
        assert len(alive) <= 8


def test_what_raises_is_asked_again() -> None:
    numbers = count()
    memory: TwoGenerationCache[str, float] = TwoGenerationCache(lambda _: 1 / next(numbers), len)
    with pytest.raises(ZeroDivisionError):
        memory["a"]
    assert [memory["a"], memory["a"]] == [1.0, 1.0]


def test_any_number_of_threads_may_ask() -> None:
    memory = TwoGenerationCache(str.upper, len, most=4)
    wrong: list[str] = []

    def ask() -> None:
        for number in range(20_000):
            text = f"a{number % 7}"
            if memory[text] != text.upper():
                wrong.append(text)

    threads = [Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ------------------------------------------------------------------------ told, each for a time


def expiring(most: int = 3, most_weight: int = 10) -> ExpiringCache[str, str]:
    return ExpiringCache(len, most=most, most_weight=most_weight)


def test_a_value_is_found_until_its_time_is_over() -> None:
    cache = expiring()
    cache.put("a", "A", until=10.0)
    assert [cache.get("a", now) for now in (0.0, 9.9, 10.0, 9.9)] == ["A", "A", None, None]
    assert cache.get("b", 0.0) is None


def test_the_least_recently_used_goes_first() -> None:
    cache = expiring(most=3)
    for key in "abc":
        cache.put(key, key.upper(), until=1.0)
    assert cache.get("a", 0.0) == "A"
    cache.put("d", "D", until=1.0)
    assert [cache.get(key, 0.0) for key in "abcd"] == ["A", None, "C", "D"]


def test_what_is_too_heavy_alone_is_not_kept_nor_anything_beside_it() -> None:
    cache = expiring(most_weight=10)
    cache.put("a", "A", until=1.0)
    cache.put("b", "B" * 11, until=1.0)
    assert [cache.get(key, 0.0) for key in "ab"] == [None, None]
    cache.put("c", "C" * 10, until=1.0)  # nothing weighs any more
    assert cache.get("c", 0.0) == "C" * 10


STEPS = st.lists(
    st.tuples(st.sampled_from("abcdef"), st.integers(0, 6), st.integers(0, 5), st.booleans())
)


@given(STEPS)
def test_number_and_weight_are_bounded_and_the_latest_value_counts(
    steps: list[tuple[str, int, int, bool]],
) -> None:
    cache = expiring(most=3, most_weight=10)
    told: dict[str, tuple[float, str]] = {}
    for now, (key, weight, good_for, is_told) in enumerate(steps):
        if is_told:
            told[key] = (now + good_for, f"{now:0{weight}}" if weight else "")
            cache.put(key, told[key][1], until=told[key][0])
        else:
            value = cache.get(key, now)
            assert value is None or (value == told[key][1] and now < told[key][0])
        kept = [value for _, value in cache._kept.values()]
        assert len(kept) <= 3
        assert sum(map(len, kept)) == cache._weight <= 10
