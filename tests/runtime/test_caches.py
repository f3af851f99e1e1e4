"""What is remembered of strangers' texts: bounded, whatever they send."""

from __future__ import annotations

from flask_usage_metrics.runtime.caches import TwoGenerationCache


class Maker:
    def __init__(self, most: int = 8, longest: int = 10) -> None:
        self.made: list[str] = []
        self.memory: TwoGenerationCache[tuple[str], str | None] = TwoGenerationCache(
            self.make, lambda key: len(key[0]), most=most, longest=longest
        )

    def make(self, text: str) -> str | None:
        self.made.append(text)
        return text.upper() or None


def test_what_is_known_is_not_made_again() -> None:
    maker = Maker()
    assert [maker.memory[text,] for text in ("a", "", "a", "b", "")] == ["A", None, "A", "B", None]
    assert maker.made == ["a", "", "b"]
    assert maker.memory.everything() == {("a",): "A", ("",): None, ("b",): "B"}


def test_what_is_long_is_made_each_time() -> None:
    maker = Maker()
    for _ in range(3):
        assert maker.memory["x" * 11,] == "X" * 11
        assert maker.memory["y" * 10,] == "Y" * 10
    assert maker.made == ["x" * 11, "y" * 10, "x" * 11, "x" * 11]
    assert list(maker.memory.everything()) == [("y" * 10,)]


def test_the_latest_are_kept_and_never_more_than_there_may_be() -> None:
    maker = Maker()
    for number in range(1000):
        assert maker.memory["often",] == "OFTEN"
        assert maker.memory[str(number),] == str(number)
        assert len(maker.memory.everything()) <= 8
    assert maker.made.count("often") == 1
    assert {(str(number),) for number in range(996, 1000)} <= maker.memory.everything().keys()
