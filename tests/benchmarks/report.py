"""What was measured, as one table: absolute figures, and beside each how it compares and grows."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

_TIMES = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        what: What was measured, such as ``"CPU a request"``; figures with the same text are
            compared with each other.
        who: Who was measured: ``"bare Flask"``, ``"ours, SQLite"``, ``"client_python"``.
        value: In the unit; a median where it was measured more than once.
        unit: Such as ``"µs"``.
        size: How much there was, such as 10 000 label sets; None: it has no size.
        against: The ``who`` whose value of the same what, unit and size the ratio is to; None:
            nobody's.
        aim: What the ratio, or without one the value, shall be: ``"<= 1.1"``; ``""``: anything.
    """

    what: str
    who: str
    value: float
    unit: str
    size: int | None = None
    against: str | None = None
    aim: str = ""


def table(figures: Iterable[Figure]) -> str:
    """Return the figures as a Markdown table.

    The ratio is that of the value to the value of `Figure.against`. The growth is that of the
    value since the size before: 9.8 times for 10 times the size.
    """
    figures = list(figures)
    lines = [
        "| what | who | size | value | ratio | growth | aim |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for figure in figures:
        size = "" if figure.size is None else f"{figure.size:,}"
        cells = (
            figure.what,
            figure.who,
            size,
            f"{spelled(figure.value)} {figure.unit}",
            _ratio(figure, figures),
            _growth(figure, figures),
            figure.aim,
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def spelled(value: float) -> str:
    """Return a number with three digits, or whole."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _ratio(figure: Figure, figures: list[Figure]) -> str:
    if figure.against is None:
        return ""
    for other in figures:
        same = (other.what, other.unit, other.size) == (figure.what, figure.unit, figure.size)
        if same and other.who == figure.against:
            ratio = figure.value / other.value
            # Small ratios are read as fractions: 1/15 of a peer's.
            text = f"1/{1 / ratio:.1f}" if 0 < ratio < 0.2 else f"{ratio:.2f}"
            return f"{text} of {figure.against}"
    raise ValueError(f"{figure.against!r} has no figure for {figure.what!r}")


def _growth(figure: Figure, figures: list[Figure]) -> str:
    before = None
    for other in figures:
        same = (other.what, other.who, other.unit) == (figure.what, figure.who, figure.unit)
        if same and other.size is not None and figure.size is not None and other.size < figure.size:
            before = other if before is None or other.size > (before.size or 0) else before
    if before is None or not before.value or not before.size or not figure.size:
        return ""
    grown, size = figure.value / before.value, figure.size / before.size
    return f"{_TIMES} {grown:.3g} for {_TIMES} {size:.3g}"
