"""GET /metrics: our families by our own encoder, the rest of the registry by client_python's."""

from __future__ import annotations

import hmac
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flask import Request, Response
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest as generate_text
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.exposition import generate_latest as generate_openmetrics
from prometheus_client.registry import Collector

from flask_usage_metrics.metrics.exposition.app_metrics import merged_registry
from flask_usage_metrics.metrics.exposition.app_metrics_files import multiprocess_files
from flask_usage_metrics.metrics.exposition.collector import UsageCollector
from flask_usage_metrics.metrics.exposition.negotiation import (
    OPENMETRICS,
    TEXT,
    prefers_openmetrics,
)
from flask_usage_metrics.metrics.exposition.text import Block, blocks_of, compress, encode
from flask_usage_metrics.metrics.families import Family
from flask_usage_metrics.runtime.faults import Faults
from flask_usage_metrics.runtime.fork_gate import FORK_GATE

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

_EOF = b"# EOF\n"


class Exposition:
    """Answers scrapes of one registry.

    Args:
        registry: The registry, with the app's own metrics.
        collector: Of our families, in that registry.
        token: Bearer token a scrape must show; None: everybody may read.
        faults: Where a failing collector of the app's own is reported.

    The app's own client_python metrics are those of all workers, and process metrics of all workers
    of the server are added up.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        collector: UsageCollector,
        token: str | None,
        faults: Faults,
    ) -> None:
        self._registry = registry
        self._collector = collector
        self._token = token
        self._faults = faults
        self._files = multiprocess_files(faults)

    def answer(self, request: Request) -> Response:
        """Return the response to a scrape; 503 while the totals cannot be had."""
        if not self.may_read(request.environ):
            return Response(status=401, headers={"WWW-Authenticate": "Bearer"})
        try:
            families = self._collector.totals.families()
            shared = self._collector.app_metrics.families(self._collector.totals.seen_run())
        except TimeoutError as error:
            self._faults.report("totals", error, "a scrape was refused")
            return Response(status=503, headers={"Retry-After": "5"})
        openmetrics = prefers_openmetrics(request.headers.get("Accept", ""))
        blocks = self._blocks(
            families, shared, openmetrics, frozenset(request.args.getlist("name[]"))
        )
        response = Response(content_type=OPENMETRICS if openmetrics else TEXT)
        response.vary.update(("Accept", "Accept-Encoding"))
        if request.accept_encodings["gzip"] > 0:
            response.content_encoding = "gzip"
            response.data = compress(blocks)
        else:
            response.data = encode(blocks)
        return response

    def wsgi_app(self) -> WSGIApplication:
        """Return a WSGI app that answers every path, for a port or a prefix of its own."""

        def metrics_app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterator[bytes]:
            request = Request(environ, populate_request=False)
            if request.method in ("GET", "HEAD"):
                response = self.answer(request)
            else:
                response = Response(status=405, headers={"Allow": "GET, HEAD"})
            return response(environ, start_response)  # type: ignore[return-value]

        return metrics_app

    def _blocks(
        self,
        families: Sequence[Family],
        shared: Mapping[str, Metric],
        openmetrics: bool,
        names: Collection[str],
    ) -> Iterator[Block]:
        """Yield the registry as text.

        Args:
            families: Ours.
            shared: The app's own that its workers share, by name.
            openmetrics: Whether in the OpenMetrics format rather than Prometheus' text format.
            names: Only the samples of these names; empty: all.
        """
        theirs = self._encode_theirs(shared, openmetrics, names)
        yield Block(lambda: theirs)
        yield from blocks_of(families, openmetrics, names)
        yield Block(lambda: _EOF if openmetrics else b"")

    def _encode_theirs(
        self, shared: Mapping[str, Metric], openmetrics: bool, names: Collection[str]
    ) -> bytes:
        """Return all other families of the registry; none if a collector of the app's own fails."""
        generate: Callable[[Collector], bytes]
        generate = generate_openmetrics if openmetrics else generate_text
        pids = self._collector.totals.workers()
        registry = merged_registry(self._registry, self._files, pids, shared)
        encoded = b""
        with (
            self._faults.caught("exposition", "only our own metrics are exposed"),
            self._collector.muted(),
            # client_python locks the registry: a child forked meanwhile would never be scraped.
            FORK_GATE.entered(),
        ):
            encoded = generate(registry.restricted_registry(names) if names else registry)
        return encoded.removesuffix(_EOF)

    def may_read(self, environ: WSGIEnvironment) -> bool:
        """Tell whether a request shows the token, if there is one."""
        if self._token is None:
            return True
        scheme, _, given = str(environ.get("HTTP_AUTHORIZATION", "")).partition(" ")
        # In bytes, which WSGI hands over decoded as Latin-1: clients send UTF-8.
        same = hmac.compare_digest(
            given.strip().encode("latin-1", "replace"), self._token.encode("utf-8", "replace")
        )
        return scheme.lower() == "bearer" and same
