"""Counts the bytes that are read of a request's body; what its headers claim may never come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from _typeshed.wsgi import WSGIEnvironment

_FILL = ("readinto", "readinto1")


class CountedInput:
    """A server's ``wsgi.input`` whose reads are counted; all else is the server's own.

    Args:
        stream: The server's.

    Attributes:
        count: Bytes that were read so far.
    """

    __slots__ = ("_stream", "count")

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.count = 0

    def read(self, *size: Any) -> bytes:
        """Read as the stream does."""
        data: bytes = self._stream.read(*size)
        self.count += len(data or b"")
        return data

    def readline(self, *size: Any) -> bytes:
        """Read a line as the stream does."""
        line: bytes = self._stream.readline(*size)
        self.count += len(line or b"")
        return line

    def readlines(self, *hint: Any) -> list[bytes]:
        """Read lines as the stream does."""
        lines: list[bytes] = self._stream.readlines(*hint)
        self.count += sum(map(len, lines))
        return lines

    def __iter__(self) -> Iterator[bytes]:
        for line in self._stream:
            self.count += len(line)
            yield line

    def __getattr__(self, name: str) -> Any:
        # Not all streams have these, and Werkzeug asks whether this one has.
        found = getattr(self._stream, name)
        if name in _FILL:
            return self._counting(found, lambda filled: filled or 0)
        return self._counting(found, len) if name in ("read1", "readall") else found

    def _counting(self, read: Callable[..., Any], size: Callable[[Any], int]) -> Any:
        def counted(*arguments: Any) -> Any:
            result = read(*arguments)
            self.count += size(result)
            return result

        return counted


def count_input(environ: WSGIEnvironment) -> CountedInput | None:
    """Have the reads of a request's body counted from now on; None if the server has no stream."""
    if "wsgi.input" not in environ:
        return None
    environ["wsgi.input"] = counted = CountedInput(environ["wsgi.input"])
    return counted


def is_announced(environ: WSGIEnvironment) -> bool:
    """Tell whether the headers of a request announce a body, perhaps an empty one."""
    return bool(environ.get("CONTENT_LENGTH")) or "HTTP_TRANSFER_ENCODING" in environ
