"""Texts that are no Unicode, or hold what databases refuse, come out valid; others as they are."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flask_usage_metrics.runtime.texts import encodable, from_wsgi, without_nul

ANY_TEXT = st.text(st.characters())  # lone surrogates and NUL among them


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_was_sent_as_utf8_comes_out_as_it_was(text: str) -> None:
    assert from_wsgi(text.encode().decode("latin-1")) == text
    assert encodable(text) == text


@given(ANY_TEXT)
def test_every_text_can_be_encoded_afterwards(text: str) -> None:
    for cleaned in (from_wsgi(text), encodable(text)):
        assert cleaned.encode().decode() == cleaned


@pytest.mark.parametrize(
    ("given", "expected"), [("caf\xc3\xa9", "café"), ("caf\xe9", "caf\ufffd"), ("\u20ac", "?")]
)
def test_bytes_that_are_no_utf8_are_replaced(given: str, expected: str) -> None:
    assert from_wsgi(given) == expected


def test_a_lone_surrogate_is_spelled_out() -> None:
    assert encodable("a\udc80b") == "a\\udc80b"


def test_no_text_of_a_json_value_keeps_a_nul() -> None:
    value = {"a\0": ["\0", {"b": "\0c\0"}, 1, None, True, 1.5], "d": "e"}
    assert without_nul(value) == {"a": ["", {"b": "c"}, 1, None, True, 1.5], "d": "e"}


@given(
    st.recursive(
        st.none() | st.integers() | ANY_TEXT,
        lambda inner: st.lists(inner) | st.dictionaries(ANY_TEXT, inner),
    )
)
def test_without_nul_there_is_none_in_the_json_either(value: object) -> None:
    assert "\0" not in json.dumps(without_nul(value), ensure_ascii=False)
    assert "\\u0000" not in json.dumps(without_nul(value)).replace("\\\\", "")
