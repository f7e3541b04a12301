"""Documents from text, JSON and Parquet files, plain or compressed: a single file or a folder."""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

import ml_collections
from etils import epath

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.corpus import compression
from mlpmem_jax.corpus.articles import chunk_lines, wikitext_articles
from mlpmem_jax.corpus.documents import Document, Part, Source
from mlpmem_jax.corpus.rows import RowReader

READERS = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "json",
    ".ndjson": "json",
    ".json": "json",
    ".parquet": "parquet",
}
_SPLIT_NAMES = {"train": "train", "valid": "validation", "val": "validation", "dev": "validation", "test": "test"}
_SPLIT_NAME = re.compile(rf"(?:^|/)({'|'.join(_SPLIT_NAMES)})", re.IGNORECASE)


def open_source(corpus: ml_collections.ConfigDict) -> Source:
    """The corpus of a file or folder, in the order of relative paths; hidden files are skipped.

    Raises:
      UserError: the path does not exist, cannot be read, or has no file of a known kind.
    """
    root = epath.Path(corpus.path).expanduser()
    rows = RowReader(corpus.text_key, corpus.group_key, corpus.group_part)
    known = ", ".join([*READERS, *(f"those with {suffix}" for suffix in compression.COMPRESSED)])
    try:
        if not root.exists():
            raise UserError(f"config.corpus.path: {root} does not exist; expected a file or folder of {known}")
        names = dict(_walk(root, "", {_real(root)})) if root.is_dir() else {root.name: root}
        files = {name: names[name] for name in sorted(names) if _kind(names[name]) and storage.is_file(names[name])}
        if root.is_dir():
            files = {name: file for name, file in files.items() if _suffix(file) != ".json" or _has_rows(file, rows)}
        inputs = {"files": storage.checksum(files)}
    except OSError as error:
        raise UserError(
            f"config.corpus.path: {_shown(error.filename or root)} cannot be read: {error.strerror}; change its "
            "permissions, or use another path"
        ) from error
    if not files:
        raise UserError(
            f"config.corpus.path: {_shown(root)} is not, and does not contain, a readable file; expected {known} "
            f"(.json with the field {corpus.text_key!r})"
        )
    notes = []
    if omitted := [_shown(name) for name in sorted(names) if name not in files]:
        notes.append(
            "skipped files with other extensions, .json files that are invalid or have no text field, broken links, "
            "pipes and devices: "
            f"{len(omitted):,} ({', '.join(omitted[:5])}{', ...' if len(omitted) > 5 else ''})"
        )
    parts = [
        Part(
            _shown(file),
            functools.partial(read_documents, file, name, rows, corpus.articles, corpus.document_bytes),
            _split_of(name) if corpus.split_by_name else "",
        )
        for name, file in files.items()
    ]
    return Source(inputs, lambda: parts, tuple(notes))


def _walk(folder: epath.Path, prefix: str, visited: set[str]) -> Iterator[tuple[str, epath.Path]]:
    """Files below a folder, with their relative names; folders that links reach again are skipped."""
    # Not iterdir of etils, which omits names that end in "~".
    entries = folder.iterdir() if storage.is_remote(folder) else map(folder.joinpath, os.listdir(folder))
    for entry in sorted(entries, key=lambda entry: entry.name):
        if entry.name.startswith(".") or (real := _real(entry)) in visited:
            continue
        visited.add(real)
        if entry.is_dir():
            yield from _walk(entry, f"{prefix}{entry.name}/", visited)
        else:
            yield prefix + entry.name, entry


def _real(path: epath.Path) -> str:
    name = os.fspath(path)
    return name if storage.is_remote(name) else os.path.realpath(name)


def _shown(path) -> str:
    """A path as printable text, whatever the bytes of its name."""
    return os.fspath(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _suffix(file: epath.Path) -> str:
    """The lowercase file extension, ignoring that of a compression."""
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in compression.COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _kind(file: epath.Path) -> str | None:
    return READERS.get(_suffix(file))


def _has_rows(file: epath.Path, rows: RowReader) -> bool:
    """Whether a .json file has rows with text (rather than, say, settings); True if it cannot be read."""
    try:
        with file.open("rb") as raw:
            stream = compression.decompress(raw, file.suffix.lower())
            where, row = next(_json_rows(file, io.TextIOWrapper(stream, encoding="utf-8-sig")), (_shown(file), None))
            rows.document(row, where)
    except UserError:
        return False
    except compression.ERRORS:
        return True  # the reader of the corpus will report what is wrong
    return True


def _split_of(name: str) -> str:
    """The split whose name is the prefix of the file's name or of a folder's above it.

    Raises:
      UserError: there is none.
    """
    if match := _SPLIT_NAME.search(name):
        return _SPLIT_NAMES[match[1].lower()]
    raise UserError(
        f"config.corpus.split_by_name: expected file names, or names of folders above them, that begin with "
        f"{', '.join(_SPLIT_NAMES)}, found {_shown(name)!r}"
    )


def origin(folder: epath.Path) -> str:
    """A checksum over all files below a folder, whether they are read for text or not."""
    return storage.checksum(
        {name: file for name, file in sorted(_walk(folder, "", {_real(folder)})) if storage.is_file(file)}
    )


def read_documents(
    file: epath.Path, name: str, rows: RowReader, articles: str, document_bytes: int
) -> Iterator[Document]:
    """The documents of one file.

    Args:
      file: the file, whose name determines its kind and compression.
      name: the group of a text file's documents; does not depend on the location of the corpus.
      rows: reads the fields of JSON and Parquet files.
      articles: "wikitext" for text files whose articles are documents; "" for others.
      document_bytes: text files longer than this become several documents, see `articles.chunk_lines`.

    Raises:
      UserError: the file is damaged or not UTF-8, or its rows lack the fields.
    """
    kind = _kind(file)
    with _named_errors(file), file.open("rb") as raw:
        stream = compression.decompress(raw, file.suffix.lower())
        if kind == "parquet":
            yield from _read_parquet(file, stream, rows)
            return
        text = io.TextIOWrapper(stream, encoding="utf-8-sig")
        if kind == "json":
            for where, row in _json_rows(file, text):
                yield rows.document(row, where)
            return
        # Limits the size, because a file without line ends must not be read into memory as a whole.
        lines = _without_nul(iter(lambda: text.readline(4 * document_bytes), ""), file)
        if articles:
            yield from map(Document, wikitext_articles(lines, _shown(file)))
        else:
            yield from (Document(chunk, name) for chunk in chunk_lines(lines, document_bytes) if chunk.strip())


def _without_nul(lines: Iterator[str], file: epath.Path) -> Iterator[str]:
    """The lines of a text file; refuses UTF-16, which is valid UTF-8 if it has no byte order mark and only ASCII."""
    for number, line in enumerate(lines, 1):
        if line.count("\0") > max(2, len(line) // 4):
            raise UserError(
                f"{_shown(file)}: expected UTF-8 text, found NUL characters in line {number}; it is UTF-16 or "
                "not text: convert it, or remove the file from config.corpus.path"
            )
        yield line


def _json_rows(file: epath.Path, text: io.TextIOWrapper) -> Iterator[tuple[str, object]]:
    """Each row with its location: lines, or the entries of the single array (or object) in a .json file."""
    numbered = ((number, line) for number, line in enumerate(text, 1) if line.strip())
    number, first = next(numbered, (0, ""))
    if not first:
        return
    if _suffix(file) == ".json" and not _is_object(first):
        content = _parse_json(first + text.read(), _shown(file))
        entries = content if isinstance(content, list) else [content]
        yield from ((f"{_shown(file)}: entry {index}", entry) for index, entry in enumerate(entries))
        return
    for line_number, line in itertools.chain([(number, first)], numbered):
        where = f"{_shown(file)}: line {line_number}"
        yield where, _parse_json(line, where)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(content: str, where: str) -> object:
    try:
        return json.loads(content)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({error})") from error
    except RecursionError as error:
        raise UserError(f"{where} nests objects or lists too deeply for Python's JSON parser") from error


def _read_parquet(file: epath.Path, stream: BinaryIO, rows: RowReader) -> Iterator[Document]:
    arrow, parquet = require("pyarrow", extra="hub"), require("pyarrow.parquet", extra="hub")
    # Parquet is read from the end, which a decompressing stream does not support.
    is_compressed = file.suffix.lower() in compression.COMPRESSED
    table = parquet.ParquetFile(io.BytesIO(stream.read()) if is_compressed else stream)
    schema = table.schema_arrow
    columns = rows.columns(schema.names)
    for column in columns:
        if schema.names.count(column) != 1:
            names = ", ".join(f"{field.name} ({field.type})" for field in schema)
            raise UserError(
                f"{_shown(file)}: expected one column {column!r}, found {names}; set config.corpus.text_key, group_key"
            )
    number = 0
    try:
        for batch in table.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield rows.document(row, f"{_shown(file)}: row {number}")
    except arrow.ArrowException as error:  # for example an encoding that is not implemented
        raise ValueError(str(error)) from error


@contextlib.contextmanager
def _named_errors(file: epath.Path) -> Iterator[None]:
    """Converts decoder errors into one error that names the file."""
    try:
        yield
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{_shown(file)}: expected UTF-8 text, found the byte 0x{byte:02x} ({error.reason}); convert it, or "
            "remove the file from config.corpus.path"
        ) from error
    except compression.ERRORS as error:
        raise UserError(
            f"{_shown(file)}: could not be read: {error}; it is damaged, or not of the kind that its name says"
        ) from error
