"""A message shows what was given where it is plain, and otherwise says of what kind it is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.runtime.shown_values import shown


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *(
            (None, "None"),
            (True, "True"),
            (5, "5"),
            (-1, "-1"),
            (1.5, "1.5"),
        ),
        *(("", "''"), ("lots", "'lots'"), ("10.0.0.0/33", "'10.0.0.0/33'"), ("a b", "'a b'")),
        ("10.0.0.1:80", "'10.0.0.1:80'"),
        ("ann:pw@host", "a text of 11 characters"),
        ("x?key=1", "a text of 7 characters"),
        ("q8Zt3vL0xN5bR7yC2wE9kJ4m1", "a text of 25 characters"),
        *(
            ([1, 0.5], "[1, 0.5]"),
            ((1, "x"), "[1, 'x']"),
            ({"availability": 99.9}, "{'availability': 99.9}"),
        ),
        *(([[1]], "a list"), ([1] * 9, "a list of 9 items"), ({"a": {"b": 1}}, "a dict")),
        (["x=1"], "[a text of 3 characters]"),
        *((b"token", "bytes"), (object(), "object"), ({1}, "set")),
    ],
)
def test_plain_values_are_shown(value: object, expected: str) -> None:
    assert shown(value) == expected


def test_an_int_that_cpython_does_not_print_is_huge() -> None:
    assert shown(10**5000) == "a huge int"


class Odd(str):
    def __repr__(self) -> str:
        raise ValueError


@given(st.text("abcdefXYZ", min_size=8), st.sampled_from([":", "@", "=", "?", "&", "\n", "'", "ü"]))
def test_no_text_of_a_url_is_shown(secret: str, sign: str) -> None:
    assert secret not in shown(f"{secret}{sign}")
    assert secret not in shown([Odd(secret), secret.encode(), f"x{sign}{secret}"])
