"""Streams of compressed files, by file extension."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import BinaryIO

import zstandard

COMPRESSED = (".gz", ".zst", ".bz2", ".xz")
ERRORS = (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError, zstandard.ZstdError)
"""Exceptions that reading a damaged file may raise."""

_READ_BYTES = 2**17


def decompress(raw: BinaryIO, suffix: str) -> BinaryIO:
    """The decompressed content of an open file; `suffix` determines the compression, if any."""
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".bz2":
        return bz2.BZ2File(raw)
    if suffix == ".xz":
        return lzma.LZMAFile(raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _READ_BYTES)
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike zstandard's own reader, it detects a truncated file."""

    def __init__(self, raw: BinaryIO):
        self._raw, self._decompressed, self._compressed = raw, b"", b""
        self._frame = None

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
                # The default rejects files written by `zstd --long=28` and above.
                self._frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            self._decompressed = self._frame.decompress(chunk)
            self._compressed = self._frame.unused_data
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count
