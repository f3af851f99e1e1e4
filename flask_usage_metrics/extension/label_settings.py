"""The settings of labels, checked together: the app's own, those of the histogram, new names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from flask_usage_metrics.errors import ConfigError
from flask_usage_metrics.metrics.names import LABELS, REQUEST_LABELS, RESERVED
from flask_usage_metrics.runtime.shown_values import shown


class LabelSettings(NamedTuple):
    """What `Shape` says of labels.

    Attributes:
        labels: Keys of ``g.track_var`` whose values are labels.
        histogram_labels: Labels of the histogram, in the order of the counter's.
        label_names: New names of labels, by their own.
    """

    labels: tuple[str, ...]
    histogram_labels: tuple[str, ...]
    label_names: dict[str, str]


def check_labels(
    labels: Sequence[str], histogram_labels: Sequence[str] | None, label_names: Mapping[str, Any]
) -> LabelSettings:
    """Check what was given.

    Args:
        labels: TRACK_USAGE_LABELS.
        histogram_labels: TRACK_USAGE_HISTOGRAM_LABELS; None: those of the counter.
        label_names: TRACK_USAGE_LABEL_NAMES.

    Raises:
        ConfigError: A label is not known, cannot be one, or there would be two of one name.
    """
    for position, label in enumerate(labels):
        _check_own(label, labels[:position])
    ours = (*REQUEST_LABELS, *labels)
    picked = ours if histogram_labels is None else histogram_labels
    if not set(picked) <= set(ours):
        raise ConfigError(
            f"TRACK_USAGE_HISTOGRAM_LABELS must be a list of some of {', '.join(ours)}, "
            f"not {shown(histogram_labels)}"
        )
    return LabelSettings(
        tuple(labels),
        tuple(label for label in ours if label in picked),
        _new_names(label_names, (*LABELS, *labels)),
    )


def _check_own(label: str, others: Sequence[str]) -> None:
    why = ""
    if not _is_name(label):
        why = "is no name of ASCII letters, digits and _"
    elif label in LABELS:
        why = "is a label of ours already"
    elif label in RESERVED:
        why = "is a label that Prometheus writes itself"
    elif label in others:
        why = "is there twice"
    if why:
        raise ConfigError(
            "TRACK_USAGE_LABELS must be a list of keys of g.track_var that can be labels, "
            f"but {shown(label)} {why}"
        )


def _new_names(given: Mapping[str, Any], known: Sequence[str]) -> dict[str, str]:
    names = [given.get(label, label) for label in known]
    wrong = [name for name in names if not _is_name(name) or name in RESERVED]
    twice = [name for name in names if names.count(name) > 1]
    if wrong or twice or not set(given) <= set(known):
        why = f", which gives two the name {shown(twice[0])}" if twice and not wrong else ""
        raise ConfigError(
            f"TRACK_USAGE_LABEL_NAMES must be a dict of new names for some of {', '.join(known)}, "
            f"not {shown(given)}{why}"
        )
    return {label: name for label, name in given.items() if label != name}


def _is_name(name: object) -> bool:
    # Prometheus keeps what starts with two underscores for itself.
    is_text = isinstance(name, str) and name.isidentifier() and name.isascii()
    return is_text and not str(name).startswith("__")
