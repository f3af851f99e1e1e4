"""Texts that look like addresses, or nearly, for property tests."""

from __future__ import annotations

from hypothesis import strategies as st

ODD_TEXTS = st.one_of(
    st.text(st.characters(), max_size=80),  # includes NUL and lone surrogates
    st.text("0123456789abcdef:.%[]\"' /", max_size=70),
    st.builds(
        "{}{}{}{}".format,
        st.sampled_from(["", "[", '"', "'[", " "]),
        st.ip_addresses(),
        st.sampled_from(["", "]", "%eth0]", "%", "/8"]),
        st.sampled_from(["", ":80", ":", ":99999999", '"', " ,"]),
    ),
)
