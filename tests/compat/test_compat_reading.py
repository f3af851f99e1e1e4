"""get_usage and get_sum, as flask-track-usage documents and tests them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from datetime import datetime, timedelta
from typing import Any

import pytest
import sqlalchemy as sa
from helpers.old_app import FIREFOX, Shop, user

from flask_usage_metrics import summarization
from flask_usage_metrics.storage import Storage
from flask_usage_metrics.storage.jsonl import JSONLinesStorage
from flask_usage_metrics.storage.sql import SQLStorage
from flask_usage_metrics.summarization import sumLanguage, sumRemote, sumServer, sumUrl


def test_get_usage_is_a_list_of_dicts_as_documented(
    make_storage: Callable[..., Storage], make_shop: Callable[..., Shop]
) -> None:
    shop = make_shop(storage := make_storage())
    shop.app.add_url_rule("/user/<name>", "user", user)
    shop.get("/user/ann", headers={"User-Agent": FIREFOX, "X-Forwarded-For": "10.1.2.3"})
    usage = storage.get_usage()
    assert type(usage) is list
    [item] = usage
    assert type(item) is dict
    speed, date = item.pop("speed"), item.pop("date")
    assert (type(speed), type(date), date.tzinfo) == (float, datetime, None)
    agent = {"browser": "Firefox", "language": None, "platform": "Linux", "version": "139"}
    assert item == {
        "url": "http://localhost/user/ann",
        "user_agent": agent,
        "blueprint": None,
        "view_args": '{"name": "ann"}',
        "status": 200,
        "remote_addr": "127.0.0.1",
        "xforwardedfor": "10.1.2.3",
        "authorization": False,
        "ip_info": None,
        "path": "/user/ann",
        "username": None,
        "track_var": '{"plan": "free"}',
    }


@pytest.fixture(scope="module", params=["sql", "jsonl"])
def make_kept(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Storage]]:
    """Make storages that are only read from by more than one test."""
    with ExitStack() as stack:

        def make(**options: Any) -> Storage:
            folder = tmp_path_factory.mktemp("kept")
            if request.param == "jsonl":
                return JSONLinesStorage(folder / "usage.jsonl", **options)
            engine = sa.create_engine(f"sqlite:///{folder}/usage.sqlite3")
            stack.callback(engine.dispose)
            return SQLStorage(engine, **options)

        yield make


@pytest.fixture(scope="module")
def filled(make_kept: Callable[..., Storage]) -> Storage:
    """A storage with seven records, of one second each, from noon on."""
    storage = make_kept()
    for second in range(7):
        date = int((NOON + timedelta(seconds=second) - datetime(1970, 1, 1)).total_seconds())  # noqa: DTZ001
        storage({"url": f"http://h/{second}", "path": f"/{second}", "date": date, "status": 200})
    return storage


NOON = datetime(2018, 4, 15, 12)  # noqa: DTZ001 - naive UTC, as they had it


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "6543210"),
        ({"limit": 2}, "65"),
        ({"limit": 2, "page": 2}, "43"),
        ({"limit": 2, "page": 4}, "0"),
        ({"limit": 2, "page": 5}, ""),
        ({"limit": 2, "page": 0}, "65"),
        ({"limit": 0}, ""),
        ({"start_date": NOON + timedelta(seconds=5)}, "65"),
        ({"end_date": NOON + timedelta(seconds=1)}, "10"),
        ({"start_date": NOON, "end_date": NOON}, "0"),
        ({"start_date": NOON + timedelta(days=1)}, ""),
    ],
)
def test_get_usage_by(arguments: dict[str, Any], expected: str, filled: Storage) -> None:
    assert "".join(item["path"][1:] for item in filled.get_usage(**arguments)) == expected


def test_get_usage_takes_its_arguments_by_position(filled: Storage) -> None:
    assert [item["path"] for item in filled.get_usage(NOON, NOON, 1, 1)] == ["/0"]


@pytest.fixture(scope="module")
def summed(make_kept: Callable[..., Storage]) -> Storage:
    """The four requests of its own test of sums: two of an hour apart, a day, a month later."""
    storage = make_kept(hooks=[sumUrl, sumRemote, sumLanguage, sumServer])
    for date in SUMMED:
        seconds = int((date - datetime(1970, 1, 1)).total_seconds())  # noqa: DTZ001
        storage(
            {
                "url": "http://localhost/",
                "path": "/",
                "remote_addr": "127.0.0.1",
                "server_name": "shop",
                "user_agent": {"string": FIREFOX, "language": "en"},
                "content_length": 100,
                "date": seconds,
            }
        )
    return storage


SUMMED = [
    datetime(2018, 4, 15, 8, 45, 12),  # noqa: DTZ001
    datetime(2018, 4, 15, 9, 45, 12),  # noqa: DTZ001
    datetime(2018, 4, 16, 9, 45, 12),  # noqa: DTZ001
    datetime(2018, 5, 10, 9, 45, 12),  # noqa: DTZ001
]
HOUR = SUMMED[0].replace(minute=0, second=0)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("sumUrl", "url", "http://localhost/"),
        ("sumRemote", "remote_addr", "127.0.0.1"),
        ("sumUserAgent", "user_agent_string", FIREFOX),
        ("sumLanguage", "language", "en"),
        ("sumServer", "server_name", "shop"),
    ],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_get_sum_adds_up_hour_day_and_month(
    name: str, key: str, value: str, by_name: bool, summed: Storage
) -> None:
    hook = name if by_name else getattr(summarization, name)
    sums = summed.get_sum(hook, start_date=HOUR, target=value)
    first = {"hour": HOUR, "day": HOUR.replace(hour=0), "month": HOUR.replace(day=1, hour=0)}
    hits = {"hour": 1, "day": 2, "month": 3}
    assert sums == {
        every: [{"date": first[every], "hits": n, "transfer": 100 * n, key: value}]
        for every, n in hits.items()
    }
    last = summed.get_sum(hook, start_date=SUMMED[3].replace(minute=0, second=0))
    assert [row["hits"] for rows in last.values() for row in rows] == [1, 1, 1]


def test_get_sum_is_newest_first_with_limit_and_page_a_list(summed: Storage) -> None:
    def hours(**arguments: Any) -> list[int]:
        return [row["date"].day for row in summed.get_sum(sumUrl, **arguments)["hour"]]

    assert hours() == [10, 16, 15, 15]
    assert hours(limit=1, page=2) == [16]
    assert hours(start_date=HOUR, end_date=SUMMED[2]) == [16, 15, 15]
    assert hours(target="http://elsewhere/") == []


def test_a_sum_that_there_is_not_is_not_implemented(summed: Storage) -> None:
    with pytest.raises(NotImplementedError):
        summed.get_sum("sumNothing")
    with pytest.raises(NotImplementedError):
        JSONLinesStorage("x.jsonl", hooks=["sumNothing"])
