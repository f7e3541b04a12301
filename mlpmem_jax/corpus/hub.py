"""Documents of a Hugging Face data set, with its own splits where it has them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Sequence

import ml_collections

from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.corpus.documents import Part, Source
from mlpmem_jax.corpus.files import cut_documents

_SPLIT_NAMES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
    "test": "test",
}


def open_source(corpus: ml_collections.ConfigDict) -> Source:
    """The corpus of a data set by name, or of a local folder that `datasets` can load.

    Raises:
      UserError: the extra is not installed.
    """
    require("datasets", extra="hub")
    return Source({}, functools.partial(_parts, corpus))


def _parts(corpus: ml_collections.ConfigDict) -> Sequence[Part]:
    datasets = require("datasets", extra="hub")
    try:
        splits = datasets.load_dataset(corpus.name, corpus.subset or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"config.corpus.name: the data set {corpus.name!r} (config.corpus.subset={corpus.subset!r}) could not be "
            f"loaded: {reason}"
        ) from error
    known = {name: split for name, split in _SPLIT_NAMES.items() if name in splits}
    if "train" not in known.values():
        raise UserError(f"config.corpus.name: {corpus.name!r} has no split 'train', found {sorted(splits)}")
    for name in known:
        feature = splits[name].features.get(corpus.text_key)
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise UserError(
                f"config.corpus.text_key: {corpus.name!r} has no text column {corpus.text_key!r} in its split "
                f"{name!r}, found {sorted(splits[name].features)}"
            )
    return [
        Part(
            f"{corpus.name} {name}",
            functools.partial(_documents, splits[name], corpus.text_key, corpus.document_bytes),
            split,
        )
        for name, split in known.items()
    ]


def _rows(dataset, text_key: str) -> Iterator[str]:
    for batch in dataset.select_columns([text_key]).iter(batch_size=1000):
        yield from (text or "" for text in batch[text_key])


def _documents(dataset, text_key: str, document_bytes: int) -> Iterator[str]:
    """Rows are documents, unless they are the lines of a longer text, as WikiText's are."""
    rows = _rows(dataset, text_key)
    head = list(itertools.islice(rows, 100))
    rows = itertools.chain(head, rows)
    if all(row.endswith("\n") and row.count("\n") == 1 for row in head if row.strip()):
        yield from cut_documents(rows, document_bytes)
    else:
        yield from (row for row in rows if row.strip())
