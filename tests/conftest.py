"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.examples import examples
from helpers.front_door import Site, sites
from hypothesis import settings

pytest_plugins = ["helpers.process", "helpers.selection", "helpers.watch"]

# The same examples in each run, so that a change's run judges the change. Others, to find what
# nobody thought of: pytest --hypothesis-profile=default
settings.register_profile("same", derandomize=True, max_examples=examples(100))
settings.load_profile("same")


@pytest.fixture
def make_site(tmp_path: Path) -> Iterator[Callable[..., Site]]:
    """Make tracked apps; they are closed in the end."""
    yield from sites(tmp_path)


@pytest.fixture
def site(make_site: Callable[..., Site]) -> Iterator[Site]:
    """A tracked app whose outputs must agree when the test is over."""
    made = make_site()
    yield made
    made.assert_agrees()
