"""Dicts as code for flask-track-usage gives them to a storage: what becomes of each key."""

from __future__ import annotations

import uuid
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from helpers.records import START, UTC, make_record
from hypothesis import given, settings
from hypothesis import strategies as st
from storage_contract import any_records
from werkzeug.user_agent import UserAgent

from flask_usage_metrics.records.address import normalise
from flask_usage_metrics.records.record import UsageRecord
from flask_usage_metrics.storage.compat import as_dict
from flask_usage_metrics.storage.given import as_record

SECONDS = int(START.timestamp())


@given(any_records())
@settings(deadline=None)
def test_the_dict_of_a_record_is_that_record(record: UsageRecord) -> None:
    found = as_record(as_dict(record))
    for field in UsageRecord.__struct_fields__:
        expected = getattr(record, field)
        if field == "remote_addr" and expected is not None:
            expected = normalise(expected) or expected
        if field == "user_agent":
            expected = expected or None
        assert getattr(found, field) == expected, field


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"url": "https://shop.example/user/ann"}, {"query": ""}),
        ({"url": "http://other:81/app/user/ann?x"}, {"host": "other:81", "root_path": "/app"}),
        ({"path": "/user/-"}, {"url": "https://shop.example/user/-?tab=orders"}),
        ({"url": "not a URL"}, {"scheme": "", "host": "", "path": "/user/ann"}),
        ({"url": "http://[", "path": ""}, {"scheme": "", "host": ""}),
        ({"url": "http://h/a%20b/c?d%20e", "path": None}, {"path": "/a b/c", "query": "d%20e"}),
        ({"url": "http://h/a%00b", "path": ""}, {"path": "/ab"}),
        ({"url": 5}, {"scheme": "", "path": "/user/ann"}),
        ({"remote_addr": None, "xforwardedfor": None}, {"remote_addr": None}),
        ({"xforwardedfor": "10.0.0.1"}, {"forwarded_for": "10.0.0.1"}),
        ({"remote_addr": "anonymous"}, {"remote_addr": "anonymous"}),
        ({"remote_addr": "::ffff:203.0.113.7"}, {"remote_addr": "203.0.113.7"}),
        ({"speed": 2}, {"duration_seconds": 2.0}),
        ({"speed": -0.1}, {"duration_seconds": 0.0}),
        ({"content_length": None}, {"bytes_sent": 0}),
        ({"content_length": 7}, {"bytes_sent": 7}),
        ({"server_name": "blog"}, {"app": "blog"}),
        ({"status": "404 NOT FOUND"}, {"status": 404}),
        ({"username": 7}, {"username": "7"}),
        ({"username": "a\0b\ud800"}, {"username": "ab\\ud800"}),
        ({"authorization": 1}, {"authorization": True}),
        ({"date": SECONDS}, {"started_at": START + timedelta(microseconds=5)}),
        ({"date": SECONDS + 1}, {"started_at": START + timedelta(seconds=1)}),
        ({"date": SECONDS + 0.5}, {"started_at": START + timedelta(seconds=0.5)}),
        ({"date": START.replace(tzinfo=None)}, {"started_at": START + timedelta(microseconds=5)}),
        ({"date": "2026-11-22T10:00:00+01:00"}, {"started_at": START + timedelta(microseconds=5)}),
        (
            {"date": datetime(2026, 1, 1, tzinfo=timezone(timedelta(hours=1)))},
            {"started_at": datetime(2025, 12, 31, 23, tzinfo=UTC)},
        ),
        ({"user_agent": "curl/8"}, {"user_agent": "curl/8", "browser": "Chrome"}),
        ({"user_agent": UserAgent("curl/8")}, {"user_agent": "curl/8", "browser": "Chrome"}),
        ({"user_agent": None}, {"user_agent": None}),
        ({"user_agent": {"browser": "Opera", "version": 9}}, {"browser_version": "9"}),
        ({"view_args": '{"a": [1]}'}, {"view_args": {"a": [1]}}),
        ({"view_args": "null"}, {"view_args": None}),
        ({"view_args": None}, {"view_args": None}),
        ({"view_args": '{"name": "a-long-na'}, {"view_args": {"value": '{"name": "a-long-na'}}),
        ({"track_var": {1: uuid.UUID(int=1)}}, {"track_var": {"1": str(uuid.UUID(int=1))}}),
        ({"track_var": "7"}, {"track_var": {"value": 7}}),
        ({"track_var": {"a\0": "\0b"}}, {"track_var": {"a": "b"}}),
        ({"ip_info": ""}, {"ip_info": None}),
        ({"_parent_self": object(), "more": 1}, {}),
    ],
)
def test_a_changed_key_of_flask_track_usage_holds(
    changes: dict[str, Any], expected: dict[str, Any]
) -> None:
    data = as_dict(make_record(started_at=START + timedelta(microseconds=5)))
    found = as_record({**data, **changes})
    assert {name: getattr(found, name) for name in expected} == expected


def test_what_only_flask_track_usage_tells_is_understood() -> None:
    found = as_record(
        {
            "request": "POST http://shop.example/user HTTP/1.1",
            "url_args": {"q": "a b"},
            "id": 5,  # the key of a row
            "date": SECONDS,
        }
    )
    assert (found.method, found.protocol, found.query) == ("POST", "HTTP/1.1", "q=a+b")
    assert found.started_at == START
    assert uuid.UUID(found.id).version == 7
    assert as_record({"date": SECONDS}).id != as_record({"date": SECONDS}).id


@given(st.dictionaries(st.sampled_from(sorted(as_dict(make_record()))), st.text() | st.integers()))
@settings(deadline=None)
def test_any_values_are_a_record_or_an_error_of_the_caller(data: dict[str, Any]) -> None:
    try:
        record = as_record(data)
    except (ValueError, TypeError, OverflowError, OSError):
        return
    assert "\0" not in repr(record)
    assert record.started_at.tzinfo is not None
