"""Documents from text, JSONL and Parquet files, plain or compressed, one file or a folder of them."""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import ml_collections
import zstandard
from etils import epath

from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.corpus.documents import Part, Source

READERS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
COMPRESSED = (".gz", ".zst")
_READ_BYTES = 2**17


def open_source(corpus: ml_collections.ConfigDict) -> Source:
    """The corpus of a file or folder, in the order of the relative paths; hidden files are left out.

    Raises:
      UserError: the path does not exist or holds no file of a known kind.
    """
    root = epath.Path(corpus.path).expanduser()
    known = ", ".join([*READERS, *(f"those with {suffix}" for suffix in COMPRESSED)])
    if not root.exists():
        raise UserError(f"config.corpus.path: {root} does not exist; expected a file or folder of {known}")
    files = dict(_walk(root, "")) if root.is_dir() else {root.name: root} if _kind(root) else {}
    if not files:
        raise UserError(f"config.corpus.path: {root} is or has no file that can be read; expected {known}")
    listing = "".join(f"{name}\0{files[name].stat().length}\n" for name in sorted(files))
    inputs = {"files (names and sizes)": hashlib.sha256(listing.encode()).hexdigest()}
    parts = [
        Part(str(files[name]), functools.partial(read_documents, files[name], corpus.text_key, corpus.document_bytes))
        for name in sorted(files)
    ]
    return Source(inputs, lambda: parts)


def _walk(folder: epath.Path, prefix: str) -> Iterator[tuple[str, epath.Path]]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/")
        elif _kind(entry):
            yield prefix + entry.name, entry


def _kind(file: epath.Path) -> str | None:
    name = file.with_suffix("") if file.suffix in COMPRESSED else file
    return READERS.get(name.suffix)


def read_documents(file: epath.Path, text_key: str, document_bytes: int) -> Iterator[str]:
    """The documents of one file, none of them blank.

    Args:
      file: its name says its kind and compression.
      text_key: field of JSONL and Parquet rows that holds the text.
      document_bytes: text files longer than this are cut, see `cut_documents`.

    Raises:
      UserError: it is damaged, is not UTF-8, or its rows have no such field.
    """
    kind = _kind(file)
    with _named_errors(file), file.open("rb") as raw:
        stream = _decompress(raw, file.suffix)
        if kind == "text":
            lines = io.TextIOWrapper(stream, encoding="utf-8-sig")
            # A size limit, since a file without any line end must not come into memory whole.
            yield from cut_documents(iter(lambda: lines.readline(4 * document_bytes), ""), document_bytes)
        elif kind == "jsonl":
            yield from _read_jsonl(file, io.TextIOWrapper(stream, encoding="utf-8-sig"), text_key)
        else:
            yield from _read_parquet(file, stream, text_key)


def cut_documents(lines: Iterable[str], document_bytes: int) -> Iterator[str]:
    """Joins lines to documents, each ending at the first blank line after `document_bytes`.

    Where there is no blank line for three times as long, at the end of a line. A line of spaces is blank.
    """
    document, size = [], 0
    for line in lines:
        document.append(line)
        size += len(line.encode())
        is_blank = not line.strip()
        if size >= 4 * document_bytes or (is_blank and size >= document_bytes):
            yield from _unless_blank("".join(document))
            document, size = [], 0
    yield from _unless_blank("".join(document))


def _unless_blank(text: str) -> list[str]:
    return [text] if text.strip() else []


def _read_jsonl(file: epath.Path, lines: Iterable[str], text_key: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file}: line {number} is not valid JSON ({error})") from error
        text = row.get(text_key) if isinstance(row, dict) else None
        if not isinstance(text, str):
            found = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
            raise UserError(
                f"{file}: line {number} has no text at {text_key!r}, found {found}; set config.corpus.text_key"
            )
        yield from _unless_blank(text)


def _read_parquet(file: epath.Path, stream: BinaryIO, text_key: str) -> Iterator[str]:
    parquet = require("pyarrow.parquet", extra="hub")
    # Parquet is read from its end, which a decompressing stream cannot do.
    table = parquet.ParquetFile(io.BytesIO(stream.read()) if file.suffix in COMPRESSED else stream)
    names = table.schema_arrow.names
    if text_key not in names or str(table.schema_arrow.field(text_key).type) not in ("string", "large_string"):
        fields = ", ".join(f"{field.name} ({field.type})" for field in table.schema_arrow)
        raise UserError(f"{file}: has no text column {text_key!r}, found {fields}; set config.corpus.text_key")
    for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
        for text in batch.column(0).to_pylist():
            yield from _unless_blank(text or "")


def _decompress(raw: BinaryIO, suffix: str) -> BinaryIO:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=raw)
    if suffix == ".zst":
        return io.BufferedReader(_ZstdReader(raw), _READ_BYTES)
    return raw


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a .zst file; unlike zstandard's own reader, it notices that the file was cut off."""

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
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            self._decompressed = self._frame.decompress(chunk)
            self._compressed = self._frame.unused_data
        count = min(len(buffer), len(self._decompressed))
        buffer[:count] = self._decompressed[:count]
        self._decompressed = self._decompressed[count:]
        return count


@contextlib.contextmanager
def _named_errors(file: epath.Path) -> Iterator[None]:
    """Turns what decoders raise into one error that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{file}: expected UTF-8 text, found the byte 0x{byte:02x} ({error.reason}); convert it, or "
            "take the file out of config.corpus.path"
        ) from error
    except (OSError, EOFError, ValueError, zlib.error, zstandard.ZstdError) as error:
        raise UserError(f"{file}: could not be read: {error}; it is damaged or not what its name says") from error
