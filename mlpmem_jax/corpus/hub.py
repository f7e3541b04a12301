"""Documents of Hugging Face data sets: of one with its own splits where it has them, or of a mixture."""

from __future__ import annotations

import dataclasses
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
    """The corpus of one data set or a mixture of several, by name, or of local folders that `datasets` can load.

    Several names stand in `corpus.name` with commas between; `subset` and `text_key` then hold as many entries, or one
    for all. A data set by itself keeps its own splits; a mixture, whose sets have unlike splits, is split anew, so that
    every set is in every split.

    Raises:
      UserError: the extra is not installed, or the numbers of entries differ.
    """
    require("datasets", extra="hub")
    names = corpus.name.split(",")
    entries = {"name": names}
    for key in ("subset", "text_key"):
        found = corpus[key].split(",")
        if len(found) not in (1, len(names)):
            raise UserError(
                f"config.corpus.{key}: expected {len(names)} entries, one for each data set in config.corpus.name, or "
                f"one for all, found {len(found)}: {corpus[key]!r}"
            )
        entries[key] = found * len(names) if len(found) == 1 else found
    chosen = list(zip(*entries.values(), strict=True))
    return Source({}, functools.partial(_parts, chosen, corpus.document_bytes))


def _parts(chosen: Sequence[tuple[str, str, str]], document_bytes: int) -> Sequence[Part]:
    parts = [part for entry in chosen for part in _parts_of_one(*entry, document_bytes)]
    return parts if len(chosen) == 1 else [dataclasses.replace(part, split="") for part in parts]


def _parts_of_one(name: str, subset: str, text_key: str, document_bytes: int) -> Sequence[Part]:
    datasets = require("datasets", extra="hub")
    try:
        splits = datasets.load_dataset(name, subset or None)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"config.corpus.name: the data set {name!r} (config.corpus.subset={subset!r}) could not be loaded: {reason}"
        ) from error
    known = {split: ours for split, ours in _SPLIT_NAMES.items() if split in splits}
    if "train" not in known.values():
        raise UserError(f"config.corpus.name: {name!r} has no split 'train', found {sorted(splits)}")
    for split in known:
        feature = splits[split].features.get(text_key)
        if getattr(feature, "dtype", None) not in ("string", "large_string"):
            raise UserError(
                f"config.corpus.text_key: {name!r} has no text column {text_key!r} in its split {split!r}, "
                f"found {sorted(splits[split].features)}"
            )
    return [
        Part(f"{name} {split}", functools.partial(_documents, splits[split], text_key, document_bytes), ours)
        for split, ours in known.items()
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
