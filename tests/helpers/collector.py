"""A collector that takes spans over OTLP/HTTP as protobuf, and fails when it is told to."""

from __future__ import annotations

import gzip
import select
import socket
import threading
import zlib
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from .process import free_port

Attributes = dict[str, Any]


class Received(NamedTuple):
    """A span as it came over the wire; ids in hexadecimal, empty where there is none."""

    name: str
    kind: str
    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    status: str
    attributes: Attributes
    resource: Attributes
    scope: tuple[str, str, str]
    """Name, version, schema URL."""
    peer: int
    """Port of the client: which connection it came by."""


class Receiver:
    """Listens on a free loopback port, from `up` (or entering it) until `down` (or leaving it).

    Attributes:
        endpoint: Its address, the same after it was down.
        status: What it answers; it keeps spans only if that is 200.
        hang_seconds: How long it thinks before it answers.
        hangs: Set when a request came that it thinks about.
        most: How many spans it takes in one request; more are answered with 413.
        refuses: Called with each span; one that it returns True for makes the answer a 400.
        sizes: How many spans were in each request that was answered with 200.
        refusals: How many requests were answered otherwise.
    """

    def __init__(self) -> None:
        self._address = ("127.0.0.1", free_port())
        self.endpoint = f"http://127.0.0.1:{self._address[1]}"
        self.url = f"{self.endpoint}/v1/traces"
        self.status = 200
        self.hang_seconds = 0.0
        self.hangs = threading.Event()
        self.most = 1_000_000
        self.refuses: Callable[[Received], bool] = lambda span: False
        self.sizes: list[int] = []
        self.refusals = 0
        self._lock = threading.Lock()
        self._spans: list[Received] = []
        self._released = threading.Event()
        self._server: _Server | None = None

    def __enter__(self) -> Receiver:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    def up(self) -> None:
        """Listen (again), and answer 200 at once."""
        self.status, self.hang_seconds = 200, 0.0
        self._released.clear()
        self._server = _Server(self._address, self)
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def down(self) -> None:
        """Close the port and every connection."""
        server, self._server = self._server, None
        self._released.set()
        if server is not None:
            server.shutdown()
            server.server_close()
            server.hang_up()

    def spans(self) -> list[Received]:
        """All that was kept, in the order it came."""
        with self._lock:
            return list(self._spans)

    def of(self, service: str) -> list[Received]:
        """What came of one service."""
        return [span for span in self.spans() if span.resource.get("service.name") == service]

    def servers(self) -> list[Received]:
        """The spans of requests."""
        return [span for span in self.spans() if span.kind == "SERVER"]

    def ids(self) -> list[str]:
        """Ids of the spans of requests, each as often as it came."""
        return [span.span_id for span in self.servers()]

    def answer(self, path: str, body: bytes, peer: int, is_gone: Callable[[], bool]) -> int:
        """Take one request's spans; return the status of the answer."""
        spans = _decode(body, peer)
        if seconds := self.hang_seconds:
            self.hangs.set()
            self._released.wait(seconds)
        if is_gone():  # it is not known to have been taken, so it is not
            return 0
        with self._lock:
            status = self.status if path == "/v1/traces" else 404
            if status == 200 and len(spans) > self.most:
                status = 413
            if status == 200 and any(map(self.refuses, spans)):
                status = 400
            if status == 200:
                self._spans += spans
                self.sizes.append(len(spans))
            else:
                self.refusals += 1
        return status


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, address: Any, receiver: Receiver) -> None:
        self.receiver = receiver
        self.connections: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def hang_up(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that give up are part of the tests."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        encoding = self.headers.get("Content-Encoding")
        if encoding == "gzip":
            body = gzip.decompress(body)
        elif encoding == "deflate":
            body = zlib.decompress(body)
        assert self.headers["Content-Type"] == "application/x-protobuf"
        status = self.server.receiver.answer(self.path, body, self.client_address[1], self._is_gone)
        if not status:
            self.close_connection = True
            return
        answer = ExportTraceServiceResponse().SerializeToString()
        self.send_response(status)
        self.send_header("Content-Type", "application/x-protobuf")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def _is_gone(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


def _decode(body: bytes, peer: int) -> list[Received]:
    message = ExportTraceServiceRequest.FromString(body)
    return [
        Received(
            name=span.name,
            kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_"),
            trace_id=span.trace_id.hex(),
            span_id=span.span_id.hex(),
            parent_id=span.parent_span_id.hex(),
            start_ns=span.start_time_unix_nano,
            end_ns=span.end_time_unix_nano,
            status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_"),
            attributes=_attributes(span.attributes),
            resource=_attributes(of_resource.resource.attributes),
            scope=(of_scope.scope.name, of_scope.scope.version, of_scope.schema_url),
            peer=peer,
        )
        for of_resource in message.resource_spans
        for of_scope in of_resource.scope_spans
        for span in of_scope.spans
    ]


def _attributes(found: Any) -> Attributes:
    return {attribute.key: _value(attribute.value) for attribute in found}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(one) for one in value.array_value.values]
    return None if kind is None else getattr(value, kind)
