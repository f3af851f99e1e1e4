"""An app as flask-track-usage's users have it, and storages as they write them.

What they rely on is in its documentation and its own tests: a claim a case in tests/compat.
"""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from flask import Flask, g
from prometheus_client import CollectorRegistry

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.storage import Storage

FIREFOX = "Mozilla/5.0 (X11; Linux x86_64; rv:139.0) Gecko/20100101 Firefox/139.0"


class Kept:
    """A storage as people write one: any callable."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []

    def __call__(self, data: dict[str, Any]) -> None:
        self.items.append(data)


class Shop:
    """An app, its tracker, and what a callable was given.

    Its records are delivered "inline": as there, they are stored before the response is out.
    """

    def __init__(self, folder: Path, *storages: Any, **config: Any) -> None:
        self.app = Flask("shop", instance_path=str(folder), static_folder=str(folder))
        self.app.config.update(TESTING=True, TRACK_USAGE_DELIVERY="inline")
        self.app.config["PROPAGATE_EXCEPTIONS"] = False
        self.app.config.update({f"TRACK_USAGE_{key}": value for key, value in config.items()})
        self.kept = Kept()
        self.usage = TrackUsage(
            self.app, [self.kept, *storages], registry=CollectorRegistry(), country=lambda _: None
        )

        @self.app.route("/")
        def index() -> str:
            return "Hello!"

    def get(self, path: str = "/", **options: Any) -> Any:
        return self.ask(path, method="GET", **options)

    def ask(self, path: str, **options: Any) -> Any:
        with self.app.test_client() as client:
            response = client.open(path, **options)
            response.get_data()
            return response

    def paths(self) -> list[str]:
        return [data["path"] for data in self.kept.items]

    def data(self) -> dict[str, Any]:
        [data] = self.kept.items
        return data


def user(name: str) -> str:
    g.track_var["plan"] = "free"
    return f"Hello, {name}!"


class Own(Storage):
    """A subclass as people have it: set_up, store and _get_usage."""

    def set_up(self, start: int, *, step: int = 1) -> None:
        self.items: list[dict[str, Any]] = []
        self.arguments: Any = (start, step)

    def store(self, data: dict[str, Any]) -> dict[str, Any]:
        self.items.append(data)
        return data

    def _get_usage(
        self,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        limit: int = 500,
        page: int = 1,
    ) -> list[dict[str, Any]]:
        self.arguments = (start_date, end_date, limit, page)
        return self.items
