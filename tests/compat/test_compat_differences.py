"""What differs from flask-track-usage on purpose; storage/README.md says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask, Response
from helpers.old_app import Shop
from prometheus_client import CollectorRegistry

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.storage.sql import SQLStorage


def test_content_length_is_what_was_sent(shop: Shop) -> None:
    """There it was the header: announced for HEAD, and None for a stream."""
    shop.app.add_url_rule("/stream", "stream", lambda: Response(iter(["abc", "de"])))
    shop.ask("/", method="HEAD")
    shop.get("/stream")
    assert [data["content_length"] for data in shop.kept.items] == [0, 5]


def test_a_bearer_token_is_authorization_without_a_name(shop: Shop) -> None:
    """There the name was the text None, and up to Werkzeug 2.2 it was no authorization."""
    shop.get(headers={"Authorization": "Bearer x"})
    assert (shop.data()["authorization"], shop.data()["username"]) == (True, None)


def test_a_key_in_place_of_a_user_name_is_not_kept(shop: Shop) -> None:
    shop.get(auth=("sk_live_0123456789abcdef", ""))
    assert "0123456789" not in repr(shop.data())


def test_an_engine_with_a_database_in_memory_for_each_thread_is_refused(
    make_shop: Callable[..., Shop],
) -> None:
    with pytest.raises(ValueError, match="StaticPool"):
        SQLStorage(sa.create_engine("sqlite://"))
    engine = sa.create_engine(
        "sqlite://", poolclass=sa.StaticPool, connect_args={"check_same_thread": False}
    )
    make_shop(storage := SQLStorage(engine)).get("/x")
    assert storage.get_usage()[0]["path"] == "/x"
    engine.dispose()


def test_the_table_is_made_with_the_first_record(
    engine: sa.Engine, make_shop: Callable[..., Shop]
) -> None:
    shop = make_shop(SQLStorage(engine))
    assert not sa.inspect(engine).has_table("flask_usage")
    shop.get()
    assert sa.inspect(engine).has_table("flask_usage")


def test_a_subclass_is_told_that_what_it_overrides_is_not_called(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Mine(TrackUsage):
        def after_request(self, response: Response) -> Response:
            return response

    app = Flask("shop", instance_path=str(tmp_path))
    with Mine(app, [], registry=CollectorRegistry()), caplog.at_level("WARNING"):
        pass
    assert [message.partition(":")[0] for message in caplog.messages] == [
        "Mine.after_request is not called"
    ]
    TrackUsage(Flask("other", instance_path=str(tmp_path)), [], registry=CollectorRegistry())
    assert len(caplog.messages) == 1
