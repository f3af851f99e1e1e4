"""The shop: a small tracked Flask app, with pages for people and endpoints for programs."""

from __future__ import annotations

import random
import time
from typing import Any

from flask import Blueprint, Flask, Response, abort, g, redirect, request, url_for
from prometheus_client import CollectorRegistry
from werkzeug.wrappers import Response as AnyResponse

from flask_usage_metrics import TrackUsage
from flask_usage_metrics.demo.visitors import HOST


def create_app(storage: Any = None, **options: Any) -> Flask:
    """Make the shop for a server such as gunicorn: 'flask_usage_metrics.demo:create_app()'."""
    return make_app(storage, **options)[0]


def make_app(storage: Any, **options: Any) -> tuple[Flask, TrackUsage]:
    """Make the shop, and what tracks it.

    Args:
        storage: As for `TrackUsage`.
        **options: As for `TrackUsage`.

    Raises:
        ConfigError: One of these is wrong.
    """
    app = Flask("shop", static_folder=None)
    # The visitors all come from this machine; whom they speak for is in X-Forwarded-For.
    app.config["TRACK_USAGE_TRUSTED_PROXIES"] = [HOST]
    # One checkout in twenty-five crashes, and a search may take long: so that there is an error
    # budget to watch being used up.
    app.config["TRACK_USAGE_SLO"] = {"availability": 0.99, "latency": (0.95, 0.05)}
    app.config.from_prefixed_env()
    # A registry of its own, so that a second shop in this process counts from zero.
    usage = TrackUsage(app, storage, **{"registry": CollectorRegistry(), **options})
    app.register_blueprint(make_shop())
    app.register_blueprint(make_api())
    app.logger.disabled = True  # some checkouts crash on purpose: not a traceback for each
    return app, usage


def make_shop() -> Blueprint:
    """Make the pages that people and crawlers visit."""
    shop = Blueprint("shop", __name__)

    @shop.get("/")
    def home() -> str:
        return "<h1>A small shop</h1>" + "<p>Tea, pots and cups.</p>" * 20

    @shop.get("/product/<int:number>")
    def product(number: int) -> str:
        work(0.004)
        return f"<h1>Product {number}</h1>" if 1 <= number <= 40 else abort(404)

    @shop.get("/search")
    def search() -> str:
        work(0.02)
        g.track_var["q"] = request.args["q"]  # is kept with the record
        return "<ul>" + "<li>A product</li>" * 10 + "</ul>"

    @shop.route("/cart", methods=["GET", "POST"])
    def cart() -> str | AnyResponse:
        work(0.005)
        return redirect(url_for("shop.cart"), 303) if request.method == "POST" else "<h1>Cart</h1>"

    @shop.post("/checkout")
    def checkout() -> tuple[str, int]:
        work(0.04)
        if (problem := {"declined": 402, "late": 409}.get(request.form["card"])) is not None:
            return "<h1>Sorry</h1>", problem
        rate = 100 / int(request.form["instalments"])  # nobody thought of 0
        return f"<h1>Thank you</h1><p>{rate:.2f} a month.</p>", 201

    @shop.get("/feed.xml")
    def feed() -> AnyResponse:
        response = Response("<feed>" + "<entry/>" * 50 + "</feed>", mimetype="application/atom+xml")
        response.set_etag("monday")
        return response.make_conditional(request)

    return shop


def make_api() -> Blueprint:
    """Make the endpoints that programs call."""
    api = Blueprint("api", __name__, url_prefix="/api")

    @api.get("/stock/<int:number>")
    def stock(number: int) -> dict[str, int]:
        return {"product": number, "pieces": 7 * number % 12}

    @api.post("/orders")
    def order() -> tuple[dict[str, str], int]:
        work(0.01)
        return ({"is": "ordered"}, 201) if request.authorization else ({"error": "who?"}, 401)

    @api.get("/orders.csv")
    def export() -> Response:
        lines = (f"{number},{number % 40 + 1},{number % 3 + 1}\n" for number in range(1000))
        return Response(lines, mimetype="text/csv")  # sent line by line

    return api


def work(seconds: float) -> None:
    """Sleep for a random time, of this many seconds on average, as a database might take."""
    time.sleep(random.expovariate(1 / seconds))
