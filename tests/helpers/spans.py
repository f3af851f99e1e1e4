"""Spans of sites, as a collector receives them: compared with their records."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from helpers.collector import Receiver
from helpers.front_door import Site
from helpers.process import Process, start_python
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

Make = Callable[..., Site]
SDK = tuple(int(part) for part in version("opentelemetry-sdk").split(".")[:2])
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def visit(site: Site, count: int, path: str = "/") -> None:
    for _ in range(count):
        assert site.get(path).status_code == 200


def account(written: int, dropped: int = 0, failed: int = 0, pending: int = 0) -> dict[str, int]:
    return {"written": written, "dropped": dropped, "failed": failed, "pending": pending}


def is_up(site: Site) -> float:
    return site.samples("flask_usage_sink_up")[(("sink", "traces"),)]


def assert_agrees(site: Site, collector: Receiver) -> None:
    """Spans = records, each once, with the same ids, times and status."""
    site.assert_agrees()
    records = {record.span_id: record for record in site.records()}
    assert sorted(collector.ids()) == sorted(records)
    for span in collector.servers():
        record = records[span.span_id]
        assert span.trace_id == record.trace_id
        assert span.parent_id == (record.parent_span_id or "")
        assert span.start_ns // 1000 == int(record.started_at.timestamp() * 1e6 + 0.5)
        assert span.end_ns - span.start_ns == round(record.duration_seconds * 1e9)
        assert span.attributes["http.response.status_code"] == record.status
        assert span.attributes["flask_usage.record_id"] == record.id
    assert site.account("traces") == account(len(records))


def exporter(collector: Receiver) -> OTLPSpanExporter:
    made = OTLPSpanExporter(collector.url, timeout=1)
    made._MAX_RETRY_TIMEOUT = 2  # that of SDK 1.20 tries for a minute, whatever the timeout
    return made


def sampled(site: Site) -> list[str | None]:
    """Ids of the spans of all requests that a half is taken of, by the ids of their traces."""
    sampler = TraceIdRatioBased(0.5)
    return [
        record.span_id
        for record in site.usage.storage.records()
        if sampler.should_sample(None, int(record.trace_id or "", 16), "").decision
        is not Decision.DROP
    ]


def start(folder: Path, program: str, *arguments: str, **environment: str) -> Process:
    """Start a Python program in a folder of its own."""
    folder.mkdir(exist_ok=True)
    return start_python(
        program,
        *arguments,
        # urllib3 leaves sockets to the garbage collector when an exporter of the SDK is shut down.
        warnings=("error", "ignore::ResourceWarning"),
        folder=folder,
        env={"TMPDIR": str(folder), **environment},
    )
