"""The texts of a request's environ: all of them, in order, and bounded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from werkzeug.test import EnvironBuilder

from flask_usage_metrics.capture.reading import MAX_ENVIRON_CHARACTERS, environ_texts
from flask_usage_metrics.records.observation import ENVIRON_KEYS


@settings(deadline=None)
@given(
    st.dictionaries(
        st.sampled_from((*ENVIRON_KEYS, "HTTP_CF_IPCOUNTRY", "HTTP_COOKIE", "wsgi.version")),
        st.one_of(st.text(max_size=20), st.integers(), st.none()),
    )
)
def test_texts_are_those_of_the_keys_in_their_order(environ: dict[str, Any]) -> None:
    texts = environ_texts(environ, ("HTTP_CF_IPCOUNTRY",))
    keys = (*ENVIRON_KEYS, "HTTP_CF_IPCOUNTRY")
    assert texts == tuple("" if environ.get(key) is None else str(environ[key]) for key in keys)


@pytest.mark.parametrize("missing", [None, "REMOTE_ADDR", "HTTP_USER_AGENT"])
@pytest.mark.parametrize("platform", [None, '"Linux"', 7])
def test_hints_follow_the_user_agent_a_line_each(missing: str | None, platform: Any) -> None:
    environ = EnvironBuilder("/", headers={"User-Agent": "x", "Sec-CH-UA": '"y"'}).get_environ()
    environ |= {} if platform is None else {"HTTP_SEC_CH_UA_PLATFORM": platform}
    environ.pop(missing, None)
    texts = environ_texts(environ, ())
    agent = "" if missing == "HTTP_USER_AGENT" else "x"
    assert texts[ENVIRON_KEYS.index("HTTP_USER_AGENT")] == f'{agent}\n"y"\n{platform or ""}'


@pytest.mark.parametrize("missing", [None, "REMOTE_ADDR"])
@pytest.mark.parametrize("key", ["HTTP_USER_AGENT", "QUERY_STRING", "HTTP_CF_IPCOUNTRY"])
def test_large_texts_are_cut_together(key: str, missing: str | None) -> None:
    environ = EnvironBuilder("/").get_environ() | {"REMOTE_ADDR": "::1"}
    environ.pop(missing, None)
    for size, kept in ((MAX_ENVIRON_CHARACTERS // 2, None), (MAX_ENVIRON_CHARACTERS, 2048)):
        texts = environ_texts(environ | {key: "x" * size}, ("HTTP_CF_IPCOUNTRY",))
        assert max(map(len, texts)) == (kept or size)
