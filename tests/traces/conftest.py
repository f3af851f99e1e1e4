"""A collector of spans, and sites that send it theirs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from helpers.collector import Receiver
from helpers.front_door import Site
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.util._once import Once

Make = Callable[..., Site]


@pytest.fixture
def collector() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture
def environment(collector: Receiver, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the SDK's variables name the collector, and no global provider set."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    monkeypatch.setattr(trace, "_TRACER_PROVIDER_SET_ONCE", Once())
    yield
    provider = trace.get_tracer_provider()
    if isinstance(provider, TracerProvider):
        provider.shutdown()


@pytest.fixture
def make_shop(make_site: Make) -> Make:
    """Make a site with traces, and views that succeed, fail and query."""

    def make(traces: Any = True, **options: Any) -> Site:
        site = make_site(TRACES=traces, **options)
        site.app.add_url_rule("/", "index", lambda: "x")
        site.app.add_url_rule("/fails", "fails", lambda: ("x", 503))

        @site.app.get("/item/<int:number>")
        def item(number: int) -> str:
            with trace.get_tracer("child").start_as_current_span(f"SELECT {number}"):
                return "x"

        return site

    return make
