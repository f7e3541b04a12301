"""Streams of compressed files, by file extension."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import zstandard

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""Exceptions that reading a damaged file may raise."""

_READ_BYTES = 2**17


def decompress(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The decompressed content of an open file; `suffix` determines the compression, if any."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix in _DECOMPRESSORS:
        return io.BufferedReader(_Reader(raw, _DECOMPRESSORS[suffix]), _READ_BYTES)
    return raw


_DECOMPRESSORS = {
    ".bz2": bz2.BZ2Decompressor,
    ".xz": lzma.LZMADecompressor,
    # The default rejects files written by `zstd --long=28` and above.
    ".zst": lambda: zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj(),
}


class _Reader(io.RawIOBase):
    """Decompressed bytes of a file of one or more compressed frames.

    The libraries' own readers end without an error where a file was truncated (zstandard) or where a frame after the
    first one is damaged (bz2, lzma).
    """

    def __init__(self, raw: BinaryIO, decompressor: Callable[[], Any]):
        self._raw, self._decompressor = raw, decompressor
        self._decompressed, self._compressed, self._frame = b"", b"", None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._decompressed:
            chunk = self._compressed or self._raw.read(_READ_BYTES)
            if not chunk:
                if self._frame is not None and not self._frame.eof:
                    raise EOFError("compressed file ended before the end of its last frame")
                return 0
            if self._frame is None or self._frame.eof:
                self._compressed = b""
                if not (chunk := chunk.lstrip(b"\0")):  # padding between frames
                    continue
                self._frame = self._decompressor()
            self._decompressed = self._frame.decompress(chunk)
            self._compressed = self._frame.unused_data
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count
