"""Apps, engines and storages as flask-track-usage's users make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from helpers.old_app import Shop

from flask_usage_metrics.storage import Storage
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.sql import SQLStorage


@pytest.fixture
def make_shop(tmp_path: Path) -> Iterator[Callable[..., Shop]]:
    made: list[Shop] = []

    def make(*storages: Any, **config: Any) -> Shop:
        made.append(Shop(tmp_path / f"instance{len(made)}", *storages, **config))
        return made[-1]

    yield make
    for shop in made:
        shop.usage.close()


@pytest.fixture
def shop(make_shop: Callable[..., Shop]) -> Shop:
    return make_shop()


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[sa.Engine]:
    engine = sa.create_engine(f"sqlite:///{tmp_path}/own.sqlite3")
    yield engine
    engine.dispose()


@pytest.fixture(params=["sql", "jsonl"])
def make_storage(
    request: pytest.FixtureRequest, engine: sa.Engine, tmp_path: Path
) -> Callable[..., Storage]:
    def make(**options: Any) -> Storage:
        if request.param == "sql":
            return SQLStorage(engine=engine, **options)
        return JSONLinesStorage(tmp_path / "usage.jsonl", **options)

    return make
