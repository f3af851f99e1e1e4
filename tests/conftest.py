"""Fixtures of the whole suite."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.front_door import Site, sites

pytest_plugins = ["helpers.process", "helpers.selection", "helpers.watch"]


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
