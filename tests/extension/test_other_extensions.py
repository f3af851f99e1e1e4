"""Extensions and frameworks on top of Flask: what they do to requests, errors and /metrics."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from flask import Flask, got_request_exception
from helpers.front_door import Site
from werkzeug.exceptions import HTTPException, NotFound, ServiceUnavailable


def test_flask_restx_signals_what_it_answers(make_site: Callable[..., Site]) -> None:
    restx = pytest.importorskip("flask_restx", exc_type=ImportError)
    app = Flask("shop")
    site = make_site(app=app)
    api = restx.Api(app, doc=False)

    class OutOfStock(Exception):
        pass

    raised = {
        "missing": NotFound("no tea"),
        "busy": ServiceUnavailable(),
        "stock": OutOfStock(),
        "broken": LookupError(),
    }

    @api.errorhandler(OutOfStock)
    def answer(_error: OutOfStock) -> tuple[dict[str, str], int]:
        return {"message": "sold"}, 409

    @api.route("/<name>")
    class Thing(restx.Resource):  # type: ignore[misc,name-defined]
        def get(self, name: str) -> None:
            raise raised[name]

    for name in raised:
        site.get(f"/{name}")
    found = {
        record.path[1:]: (record.endpoint, record.status, record.exception)
        for record in site.records()
    }
    assert found == {
        "missing": ("thing", 404, None),
        "busy": ("thing", 503, "ServiceUnavailable"),
        "stock": ("thing", 409, None),
        "broken": ("thing", 500, "LookupError"),
    }
    site.assert_agrees()


@pytest.mark.parametrize(("status", "expected"), [(418, None), (599, "HTTPException")])
def test_a_response_that_is_raised_may_be_signalled(
    site: Site, status: int, expected: str | None
) -> None:
    @site.app.get("/")
    def index() -> None:
        error = HTTPException(response=site.app.response_class(status=status))
        got_request_exception.send(site.app, exception=error)
        raise error

    assert site.get().status_code == status
    assert site.only_record().exception == expected
