"""Documents of Hugging Face data sets: a single one or a mixture, keeping their own splits."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Iterator, Sequence

import ml_collections
from etils import epath

from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.corpus import files
from mlpmem_jax.corpus.articles import chunk_lines, wikitext_articles
from mlpmem_jax.corpus.documents import Document, Part, Source
from mlpmem_jax.corpus.rows import RowReader

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


def open_source(corpus: ml_collections.ConfigDict) -> Source:
    """The corpus of one data set or a mixture, by name, or of local folders that `datasets` can load.

    `NAME@REVISION` is the data set at a commit, branch or tag; the commit becomes part of the artifact's manifest.

    `corpus.name` may list several names, separated by commas; `subset`, `text_key`, `group_key` and `articles` then
    have as many entries, or one for all. The splits of every data set are kept; missing ones are taken from its
    training documents, so that every set is in every split.

    Raises:
      UserError: the extra is not installed, or the numbers of entries differ.
    """
    require("datasets", extra="hub")
    names = corpus.name.split(",")
    entries = {"name": names}
    for key in ("subset", "text_key", "group_key", "articles"):
        given = corpus[key].split(",")
        if len(given) not in (1, len(names)):
            raise UserError(
                f"config.corpus.{key}: expected {len(names)} entries, one per data set in config.corpus.name, or "
                f"one for all, found {len(given)}: {corpus[key]!r}"
            )
        entries[key] = given * len(names) if len(given) == 1 else given
    chosen = [
        (name, subset, RowReader(text_key, group_key, corpus.group_part), articles)
        for name, subset, text_key, group_key, articles in zip(*entries.values(), strict=True)
    ]
    folders = {name: epath.Path(name).expanduser() for name in names}
    inputs = {f"files of {name}": files.origin(folder) for name, folder in folders.items() if folder.is_dir()}
    return Source(inputs, lambda: [part for entry in chosen for part in _parts(*entry, corpus.document_bytes)])


def located(name: str) -> tuple[str, str | None]:
    """Parses a local folder, NAME or NAME@REVISION to (folder or name, revision or None), as `datasets` takes them."""
    if epath.Path(name).expanduser().is_dir():
        return str(epath.Path(name).expanduser()), None
    path, _, revision = name.partition("@")
    return path, revision or None


@contextlib.contextmanager
def explained(what: str) -> Iterator[None]:
    """Converts errors of loading a data set into one line that begins with `what`.

    Raises:
      UserError: the data set could not be loaded.
    """
    datasets = require("datasets", extra="hub")
    try:
        yield
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{what} could not be loaded: {reason}") from error


def _parts(name: str, subset: str, rows: RowReader, articles: str, document_bytes: int) -> Sequence[Part]:
    datasets = require("datasets", extra="hub")
    with explained(f"config.corpus.name: the data set {name!r} (config.corpus.subset={subset!r})"):
        path, revision = located(name)
        builder = datasets.load_dataset_builder(path, subset or None, revision=revision)
        builder.download_and_prepare()
        splits = builder.as_dataset()
    known = {split: ours for split, ours in _SPLIT_NAMES.items() if split in splits}
    if "train" not in known.values():
        raise UserError(f"config.corpus.name: {name!r} has no split 'train', found {sorted(splits)}")
    for split in known:
        columns = splits[split].column_names
        if absent := [column for column in rows.columns(columns) if column not in columns]:
            raise UserError(
                f"config.corpus.text_key, group_key: {name!r} has no column {absent[0]!r} in its split {split!r}, "
                f"found {sorted(columns)}"
            )
    return [
        Part(
            f"{name} {split}",
            functools.partial(_documents, splits[split], f"{name} {split}", rows, articles, document_bytes),
            ours,
            data_set=f"{name} {subset}".strip(),
            revision=builder.hash,
        )
        for split, ours in known.items()
    ]


def _read_rows(dataset, name: str, rows: RowReader) -> Iterator[Document]:
    columns = rows.columns(dataset.column_names)
    number = 0
    for batch in dataset.select_columns(columns).iter(batch_size=1000):
        for values in zip(*(batch[column] for column in columns), strict=True):
            number += 1
            yield rows.document(dict(zip(columns, values, strict=True)), f"{name}: row {number}")


def _documents(dataset, name: str, rows: RowReader, articles: str, document_bytes: int) -> Iterator[Document]:
    """Yields documents: one per row, unless rows are lines of a longer text, as in WikiText."""
    documents = _read_rows(dataset, name, rows)
    if articles:
        yield from map(Document, wikitext_articles((text for text, _ in documents), name))
        return
    head = list(itertools.islice(documents, 100))
    documents = itertools.chain(head, documents)
    if all(text.endswith("\n") and text.count("\n") == 1 for text, _ in head if text.strip()):
        chunks = chunk_lines((text for text, _ in documents), document_bytes)
        yield from (Document(chunk, name) for chunk in chunks if chunk.strip())
    else:
        yield from documents
