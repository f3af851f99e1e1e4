"""A gzip stream made of parts that were compressed apart, so that a part can be used again."""

from __future__ import annotations

import zlib

_LEVEL = 1
"""The fastest; see "Figures behind the code" in tests/benchmarks/README.md."""

_HEADER = b"\x1f\x8b\x08\0\0\0\0\0\x04\xff"
"""RFC 1952: deflate, no name, no time, made fast on an unknown system."""


class CompressedText:
    """A text, compressed so that it can be put anywhere into a gzip stream.

    Attributes:
        deflated: Whole bytes of deflate that refer to nothing before them.
        size: Of the text, in bytes.
        before: CRC-32 of what was before the text when it was compressed.
        after: CRC-32 of that and the text.
        difference: By what the CRC-32 of the text differs from that of as many zeros, which is the
            same whatever is before both; None: not needed yet.
    """

    __slots__ = ("after", "before", "deflated", "difference", "size")

    def __init__(self, deflated: bytes, size: int, before: int, after: int) -> None:
        self.deflated = deflated
        self.size = size
        self.before = before
        self.after = after
        self.difference: int | None = None


class GzipStream:
    """Joins texts, and texts that other streams have compressed, to one gzip member.

    Of several members some clients read only the first.
    """

    def __init__(self) -> None:
        self._deflate = zlib.compressobj(_LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
        self._parts = [_HEADER]
        self._crc = self._size = 0
        self._zeros = memoryview(b"")

    def write(self, text: bytes) -> CompressedText:
        """Compress and append a text.

        Returns:
            What other streams may append, too.
        """
        # A full flush ends at a whole byte, and what follows refers to nothing before it.
        deflated = self._deflate.compress(text) + self._deflate.flush(zlib.Z_FULL_FLUSH)
        compressed = CompressedText(deflated, len(text), self._crc, zlib.crc32(text, self._crc))
        self._append(compressed, compressed.after)
        return compressed

    def add(self, compressed: CompressedText) -> None:
        """Append what a stream has compressed before."""
        if compressed.difference is None:
            compressed.difference = compressed.after ^ self._with_zeros(
                compressed.before, compressed.size
            )
        self._append(
            compressed, compressed.difference ^ self._with_zeros(self._crc, compressed.size)
        )

    def finish(self) -> bytes:
        """End the member, and return it."""
        self._parts.append(self._deflate.flush())
        self._parts.append(self._crc.to_bytes(4, "little"))
        self._parts.append((self._size % 2**32).to_bytes(4, "little"))
        return b"".join(self._parts)

    def _append(self, compressed: CompressedText, crc: int) -> None:
        self._parts.append(compressed.deflated)
        self._crc = crc
        self._size += compressed.size

    def _with_zeros(self, crc: int, size: int) -> int:
        """Return the CRC-32 of a text and so many zero bytes, from that of the text."""
        if len(self._zeros) < size:
            self._zeros = memoryview(bytes(size))
        return zlib.crc32(self._zeros[:size], crc)
