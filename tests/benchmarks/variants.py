"""The set-ups that are compared, each answering the same requests: one variant a process.

    PYTHONHASHSEED=0 python -m tests.benchmarks.variants all-in 1000

answers a thousand requests and leaves without cleaning up; `instructions.py` counts what that took.
"""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
import tempfile
from collections.abc import Callable
from itertools import cycle, islice
from typing import TYPE_CHECKING, Any
from wsgiref.util import FileWrapper

from flask import Flask, Response
from flask.typing import ResponseReturnValue

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIApplication

Flush = Callable[[], object]

# Longer than any run: what is buffered is folded when `flush` is called, not by the clock, which a
# simulated processor is fifty times too slow for.
NEVER_SECONDS = 86_400.0

NOWHERE = "/proc/nowhere"
"""A folder that cannot be made: without it there is no journal."""

USER_AGENTS = (
    *(
        f"Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko)"
        f" Chrome/{version}.0.0.0 Safari/537.36"
        for version in range(120, 128)
    ),
    *(
        f"Mozilla/5.0 (X11; Linux x86_64; rv:{version}.0) Gecko/20100101 Firefox/{version}.0"
        for version in range(120, 126)
    ),
    *(
        f"Mozilla/5.0 (iPhone; CPU iPhone OS 17_{version} like Mac OS X) AppleWebKit/605.1.15"
        f" (KHTML, like Gecko) Version/17.{version} Mobile/15E148 Safari/604.1"
        for version in range(4)
    ),
    "Mozilla/5.0 (compatible; Googlebot/2.1; +http://www.google.com/bot.html)",
    "curl/8.5.0",
)


def bare(app: Flask, batch: int) -> Flush | None:
    """Flask, and nothing else."""
    return None


def hooks(app: Flask, batch: int) -> Flush | None:
    """What every hook-based extension costs before it does anything."""

    @app.before_request
    def before() -> ResponseReturnValue | None:
        return None

    @app.after_request
    def after(response: Response) -> Response:
        return response

    return None


def capture(app: Flask, batch: int) -> Flush | None:
    """What we cost on the request's own thread: everything is captured, nothing is folded."""
    track_usage(app, [], TRACK_USAGE_STATE_DIR=NOWHERE, TRACK_USAGE_BUFFER_RECORDS=1_000_000)
    return None


def capture_journaled(app: Flask, batch: int) -> Flush | None:
    """As `capture`, and on disk by then, so that it survives a kill."""
    track_usage(app, [], TRACK_USAGE_BUFFER_RECORDS=1_000_000)
    return None


def all_in(app: Flask, batch: int) -> Flush | None:
    """Metrics, and every request as a row in SQLite."""
    usage = track_usage(app, f"sqlite:///{tempfile.mkdtemp()}/usage.sqlite3")
    return lambda: usage.flush(600.0)


def metrics_only(app: Flask, batch: int) -> Flush | None:
    """As `all_in`, with no storage."""
    usage = track_usage(app, [])
    return lambda: usage.flush(600.0)


def track_usage(
    app: Flask, storage: object, *, tracer_provider: object = None, **settings: object
) -> Any:
    from prometheus_client import CollectorRegistry

    from flask_usage_metrics import TrackUsage

    # A folder of its own: what one run leaves, the next of the same app would take up.
    app.config.from_mapping(
        {
            "TRACK_USAGE_FLUSH_SECONDS": NEVER_SECONDS,
            "TRACK_USAGE_STATE_DIR": tempfile.mkdtemp(),
            **settings,
        }
    )
    registry = CollectorRegistry()
    return TrackUsage(app, storage, registry=registry, tracer_provider=tracer_provider)


def prometheus_flask_exporter(app: Flask, batch: int) -> Flush | None:
    """A counter and a histogram by endpoint, method and status; no rows, no country."""
    from prometheus_client import CollectorRegistry
    from prometheus_flask_exporter import PrometheusMetrics

    PrometheusMetrics(app, group_by="endpoint", registry=CollectorRegistry())
    return None


def traces(app: Flask, batch: int) -> Flush | None:
    """As `metrics_only`, and a span a request, exported to nowhere."""
    provider, flush_spans = tracer_provider(batch)
    usage = track_usage(app, [], tracer_provider=provider)
    return lambda: usage.flush(600.0) and flush_spans()


def traces_sampled_out(app: Flask, batch: int) -> Flush | None:
    """As `traces`, but the sampler takes none."""
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

    provider, _ = tracer_provider(batch, ALWAYS_OFF)
    usage = track_usage(app, [], tracer_provider=provider)
    return lambda: usage.flush(600.0)


def opentelemetry(app: Flask, batch: int) -> Flush | None:
    """A span a request, exported in batches to nowhere: serialising and sending come on top."""
    from opentelemetry.instrumentation.flask import FlaskInstrumentor
    from opentelemetry.metrics import NoOpMeterProvider

    provider, flush = tracer_provider(batch)
    FlaskInstrumentor.instrument_app(
        app, tracer_provider=provider, meter_provider=NoOpMeterProvider()
    )
    return flush


def opentelemetry_metrics(app: Flask, batch: int) -> Flush | None:
    """As `opentelemetry`, and its metrics, read after each batch."""
    from opentelemetry.instrumentation.flask import FlaskInstrumentor
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    provider, flush_spans = tracer_provider(batch)
    reader = InMemoryMetricReader()
    FlaskInstrumentor.instrument_app(
        app, tracer_provider=provider, meter_provider=MeterProvider(metric_readers=[reader])
    )
    return lambda: reader.get_metrics_data() is not None and flush_spans()


def tracer_provider(batch: int, sampler: Any = None) -> tuple[Any, Flush]:
    """Return a provider that exports in batches to nowhere, and what makes it do so now."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult

    class Nowhere(SpanExporter):
        def export(self, spans: object) -> SpanExportResult:
            return SpanExportResult.SUCCESS

    processor = BatchSpanProcessor(
        Nowhere(),
        schedule_delay_millis=NEVER_SECONDS * 1000,
        max_queue_size=4 * batch,
        max_export_batch_size=batch,
    )
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(processor)
    return provider, processor.force_flush


STRANGERS = "metrics-only-strangers"
"""As `metrics_only`, but each request is for a path, from an address and with a referrer that none
was before: nothing that is remembered of earlier ones is of use."""

VARIANTS: dict[str, Callable[[Flask, int], Flush | None]] = {
    "bare": bare,
    "hooks": hooks,
    "capture": capture,
    "capture-journaled": capture_journaled,
    "metrics-only": metrics_only,
    STRANGERS: metrics_only,
    "all-in": all_in,
    "prometheus-flask-exporter": prometheus_flask_exporter,
    "traces": traces,
    "traces-sampled-out": traces_sampled_out,
    "opentelemetry-flask": opentelemetry,
    "opentelemetry-flask-and-metrics": opentelemetry_metrics,
}


def requests() -> list[dict[str, Any]]:
    """A hundred requests: 50 addresses, 20 user agents, 10 values of the view's argument."""
    return [
        {
            "REQUEST_METHOD": "GET",
            "SCRIPT_NAME": "",
            "PATH_INFO": f"/hello/visitor{number % 10}",
            "QUERY_STRING": "page=2",
            "RAW_URI": f"/hello/visitor{number % 10}?page=2",
            "SERVER_NAME": "0.0.0.0",
            "SERVER_PORT": "8000",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "SERVER_SOFTWARE": "server",
            "REMOTE_ADDR": f"{8 + number % 50}.{7 * number % 50}.113.9",
            "REMOTE_PORT": "50000",
            "HTTP_HOST": "shop.example",
            "HTTP_USER_AGENT": USER_AGENTS[number % 20],
            "HTTP_ACCEPT": "text/html,application/xhtml+xml,*/*;q=0.8",
            "HTTP_ACCEPT_LANGUAGE": "en-GB,en;q=0.8",
            "HTTP_ACCEPT_ENCODING": "gzip, deflate, br",
            "HTTP_REFERER": "https://shop.example/",
            "HTTP_CONNECTION": "keep-alive",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": sys.stderr,
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
            "wsgi.file_wrapper": FileWrapper,
        }
        for number in range(100)
    ]


def strangers() -> list[dict[str, Any]]:
    """Return more requests than any run has, each from somebody new."""
    return [
        environ
        | {
            "PATH_INFO": f"/hello/stranger{number}",
            "REMOTE_ADDR": f"{8 + number % 50}.{number // 50}.113.9",
            "HTTP_REFERER": f"https://shop.example/{number}",
        }
        for number, environ in enumerate(requests() * 20)
    ]


def serve(app: WSGIApplication, environ: dict[str, Any]) -> None:
    """Answer one request as a server does, but for the socket."""
    body = app(environ.copy(), start_response)
    for _ in body:
        pass
    close = getattr(body, "close", None)
    if close is not None:
        close()


def start_response(status: str, headers: object, exc_info: object = None) -> Callable[..., object]:
    if status != "200 OK":
        raise RuntimeError(status)
    return len


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("variant", choices=VARIANTS)
    parser.add_argument("requests", type=int)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--layout", type=int, default=0, help="another one of the memory")
    given = parser.parse_args()
    ballast = [f"ballast {number}" for number in range(997 * given.layout)]

    app = Flask("shop")
    app.add_url_rule("/hello/<name>", "hello", lambda name: "hello")
    flush = VARIANTS[given.variant](app, given.batch)
    asked = cycle(strangers() if given.variant == STRANGERS else requests())
    # What exists by now is no business of the collections during the loop.
    gc.collect()
    gc.freeze()
    for first in range(0, given.requests, given.batch):
        for environ in islice(asked, min(given.batch, given.requests - first)):
            serve(app, environ)
        if flush is not None and flush() is False:
            raise RuntimeError("not all was written")
    del ballast
    # No clean-up: it would fold what `capture` leaves in the buffer.
    os._exit(0)


if __name__ == "__main__":
    main()
