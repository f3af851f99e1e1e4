"""What was counted in each history of the files of totals, and what of it one file lacks.

A history ends when its file is lost. What was counted in one only grows, and its changes are
numbered: so of two who know of it, the one with the larger number knows all.
"""

from __future__ import annotations

from collections.abc import Mapping

from flask_usage_metrics.metrics.families import Numbers
from flask_usage_metrics.metrics.totals_tables import MOST_BRANCHES, Branch, SeriesKey, State

Histories = Mapping[bytes, Branch]
"""By lineage."""


def histories_of(state: State, sums: Mapping[SeriesKey, Numbers], lost: Histories) -> Histories:
    """Return the lost histories that are in sums, and the one that goes on.

    Args:
        state: Of the file with these sums.
        sums: Of all series.
        lost: The lost ones.
    """
    own = {key: [*numbers] for key, numbers in sums.items()}
    for branch in lost.values():
        for key, numbers in branch.sums.items():
            if key in own:
                own[key] = _less(own[key], numbers)
    counted = {key: numbers for key, numbers in own.items() if any(numbers)}
    return {**lost, state.lineage: Branch(state.number, counted)}


def missing(mine: Histories, theirs: Histories) -> Histories:
    """Return those of my histories of which I know more than they do.

    Not those they know nothing of if they know as many as are remembered: they may have had them.
    """
    is_full = len(theirs) > MOST_BRANCHES
    return {
        lineage: branch
        for lineage, branch in mine.items()
        if (theirs[lineage].number < branch.number if lineage in theirs else not is_full)
    }


def with_more(
    sums: Mapping[SeriesKey, Numbers], more: Histories, theirs: Histories
) -> dict[SeriesKey, Numbers]:
    """Return the sums of those series that change, with what is missing added."""
    changed: dict[SeriesKey, Numbers] = {}
    for lineage, branch in more.items():
        known = theirs[lineage].sums if lineage in theirs else {}
        for key, numbers in branch.sums.items():
            added = _less(numbers, known[key]) if key in known else numbers
            before = changed.get(key) or sums.get(key)
            changed[key] = added if before is None else plus(before, added)
    return changed


def plus(one: Numbers, other: Numbers) -> Numbers:
    """Return the sums of numbers at the same places."""
    return [a + b for a, b in zip(one, other, strict=True)]


def _less(one: Numbers, other: Numbers) -> Numbers:
    # Seconds are rounded when they are added: an ulp below zero would let a sum fall.
    return [max(a - b, 0) for a, b in zip(one, other, strict=True)]
