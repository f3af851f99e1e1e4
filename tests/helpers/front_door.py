"""A tracked Flask app and what its owner can see of it: metrics, records, accounts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flask import Flask
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from werkzeug.test import EnvironBuilder, run_wsgi_app

from flask_usage_metrics import TrackUsage, UsageRecord
from flask_usage_metrics.pipeline.processing import Processor

Labels = tuple[tuple[str, str], ...]


class Site:
    """One app with a registry and a storage of its own.

    Args:
        folder: For the default storage.
        storage: See `TrackUsage`.
        app: An app to track instead of a new one.
        **config: Settings without TRACK_USAGE_; Flask's own keys as they are.
    """

    def __init__(
        self,
        folder: Path,
        storage: Any = None,
        *,
        app: Flask | None = None,
        country: Any = None,
        username: Any = None,
        consumer: Any = None,
        tracer_provider: Any = None,
        **config: Any,
    ) -> None:
        self.app = Flask("shop") if app is None else app
        self.registry = CollectorRegistry()
        for key, value in config.items():
            self.app.config[key if key in self.app.config else f"TRACK_USAGE_{key}"] = value
        self.app.config.setdefault("TRACK_USAGE_STATE_DIR", folder / "state")
        self.app.config.setdefault("TRACK_USAGE_STORAGE", f"sqlite:///{folder}/usage.sqlite3")
        self.usage = TrackUsage(
            self.app,
            storage,
            registry=self.registry,
            country=country,
            username=username,
            consumer=consumer,
            tracer_provider=tracer_provider,
        )

    def get(self, path: str = "/", **options: Any) -> Any:
        """Answer a request as a server would: read it to its end, close it."""
        return self.request(path, method="GET", **options)

    def request(self, path: str, *, method: str, **options: Any) -> Any:
        options.setdefault("environ_base", {"REMOTE_ADDR": "203.0.113.9"})
        # Cookies are what the test sends, not what the client has collected.
        with self.app.test_client(use_cookies=False) as client:
            response = client.open(path, method=method, **options)
            response.get_data()
            return response

    def wsgi(self, path: str = "/", **options: Any) -> tuple[bytes, str]:
        """Call the WSGI app itself; return the body and the status line."""
        environ = EnvironBuilder(path, **options).get_environ()
        body, status, _ = run_wsgi_app(self.app.wsgi_app, environ, buffered=True)
        return b"".join(body), status

    def records(self) -> list[UsageRecord]:
        assert self.usage.flush()
        return list(self.usage.storage.records())

    def only_record(self) -> UsageRecord:
        (record,) = self.records()
        return record

    def scrape(self, **headers: str) -> str:
        response = self.app.test_client().get("/metrics", headers=headers)
        assert response.status_code == 200
        return response.text

    def samples(self, name: str, text: str | None = None) -> dict[Labels, float]:
        return samples(self.scrape() if text is None else text, name)

    def counted(self) -> dict[tuple[str, ...], float]:
        """Requests by (method, endpoint, status, country)."""
        found = self.samples("flask_usage_requests_total")
        order = ("method", "endpoint", "status", "country")
        return {tuple(dict(key)[name] for name in order): n for key, n in found.items()}

    def account(self, sink: str) -> dict[str, int]:
        """Records of a sink by what became of them, and the pending ones."""
        text = self.scrape()
        found = samples(text, "flask_usage_records_total")
        account = {dict(key)["result"]: int(n) for key, n in found.items() if ("sink", sink) in key}
        pending = samples(text, "flask_usage_records_pending")
        return account | {"pending": int(pending[(("sink", sink),)])}

    def faults(self) -> dict[str, int]:
        return {key[0][1]: int(n) for key, n in self.samples("flask_usage_faults_total").items()}

    def assert_agrees(self) -> None:
        """Counter = histogram = bytes = kinds of client = records, in sum and by labels."""
        records = self.records()
        text = self.scrape()
        counted = samples(text, "flask_usage_requests_total")
        observed = samples(text, "flask_usage_request_duration_seconds_count")
        seconds = samples(text, "flask_usage_request_duration_seconds_sum")
        own = self.app.config.get("TRACK_USAGE_LABELS", ())
        expected: dict[Labels, float] = {}
        named = {name for rule in self.app.url_map.iter_rules() for name in rule.methods or ()}
        for record in records:
            key = _sorted(
                country=record.country or "ZZ",
                endpoint=record.endpoint or "__unmatched__",
                method=record.method if record.method in named.union(_METHODS) else "_OTHER",
                status=str(record.status) if 100 <= record.status <= 599 else "_OTHER",
                **{name: as_label(record.track_var.get(name)) for name in own},
            )
            expected[key] = expected.get(key, 0) + 1
        assert counted == expected
        # The lifetime of a connection that was taken over is no latency.
        answered = [record for record in records if record.status != 101]
        assert observed == {key: n for key, n in expected.items() if ("status", "101") not in key}
        assert abs(sum(seconds.values()) - sum(r.duration_seconds for r in answered)) < 1e-6
        clients = samples(text, "flask_usage_client_requests_total")
        assert sum(clients.values()) == len(records)
        sent = samples(text, "flask_usage_response_bytes_total")
        assert sum(sent.values()) == sum(record.bytes_sent for record in records)
        raised = samples(text, "flask_usage_exceptions_total")
        assert sum(raised.values()) == sum(r.exception is not None for r in records)
        for objective in samples(text, "flask_usage_slo_objective_ratio"):
            held = samples(text, "flask_usage_slo_events_total")
            assert sum(n for key, n in held.items() if objective[0] in key) == len(answered)
        consumed = samples(text, "flask_usage_consumer_requests_total")
        assert sum(consumed.values()) == sum(r.consumer is not None for r in records)
        for visitors in samples(text, "flask_usage_visitors").values():
            assert visitors == len({r.visitor for r in records} - {None})
        for sink in ("metrics", "sqlite"):
            written = samples(text, "flask_usage_records_total")
            assert written[_sorted(sink=sink, result="written")] == len(records)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Have what is captured inside the block wait, however much it is."""
        processor = self.app.extensions["track_usage"].pipeline._processor
        with patch.object(Processor, "process", lambda self, *_, **__: None):
            with processor._lock:  # a batch that was begun before is over
                pass
            yield

    def close(self, timeout: float = 5.0) -> None:
        tracking = self.app.extensions["track_usage"]
        tracking.pipeline.close(timeout)


_METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH")


def samples(text: str, name: str) -> dict[Labels, float]:
    """Return the samples of a name in a text exposition, by their sorted labels."""
    return {
        _sorted(**sample.labels): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def as_label(value: Any) -> str:
    """Return a value of ``g.track_var`` as a label of the app's own has it."""
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, int | float) else ""


def _sorted(**labels: str) -> Labels:
    return tuple(sorted(labels.items()))


def sites(folder: Path) -> Iterator[Any]:
    """Make sites, and close them in the end."""
    made: list[Site] = []

    def make(storage: Any = None, **options: Any) -> Site:
        place = folder / str(len(made))
        place.mkdir()
        site = Site(place, storage, **options)
        made.append(site)
        return site

    yield make
    for site in made:
        site.close()
