"""Downloads task data from the Hugging Face hub (extra `hub`), once, into the files that tasks read."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import say
from mlpmem_jax.corpus import compression, hub

_SEED = 42  # for sampling rows, as in knnlm-limits


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A split of a data set on the hub, and how its rows map to those of the published file.

    Attributes:
      name: the data set, NAME or NAME@REVISION.
      split: the split to read.
      subset: the data set's configuration; "" = the only one.
      columns: field of the file -> column (nested names separated by dots); other columns keep their names.
      labels: field of the file -> names that replace its label numbers, which count from 0.
      drawn: number of rows to sample; 0 = all.
    """

    name: str
    split: str
    subset: str = ""
    columns: Mapping[str, str] = dataclasses.field(default_factory=dict)
    labels: Mapping[str, Sequence] = dataclasses.field(default_factory=dict)
    drawn: int = 0


def fetch(folder: pathlib.Path, files: Mapping[str, DataSet]) -> None:
    """Writes the missing files of the folder; every process does so, because folders may not be shared.

    Args:
      folder: the folder of task data.
      files: file name within the folder -> its data set on the hub.

    Raises:
      UserError: the extra is not installed, or a data set cannot be read.
    """
    for name, data_set in files.items():
        file = folder / name
        if any(file.with_name(file.name + end).exists() for end in ("", *compression.COMPRESSED)):
            continue
        say(f"{file}: downloaded from the data set {data_set.name} on the hub")
        _write(file, _rows(data_set))


def _rows(data_set: DataSet) -> list[dict]:
    datasets = require("datasets", extra="hub")
    with hub.explained(f"the data set {data_set.name!r} (subset {data_set.subset!r}, split {data_set.split!r})"):
        path, revision = hub.located(data_set.name)
        loaded = datasets.load_dataset(path, data_set.subset or None, split=data_set.split, revision=revision)
    if data_set.drawn:
        chosen = np.random.RandomState(_SEED).choice(len(loaded), min(data_set.drawn, len(loaded)), replace=False)
        loaded = loaded.select(chosen)
    return [_row(row, data_set) for row in loaded]


def _row(row: Mapping, data_set: DataSet) -> dict:
    converted = dict(row)
    for field, column in data_set.columns.items():
        value = row
        for name in column.split("."):
            if name not in value:
                raise UserError(f"the data set {data_set.name!r} has no column {column!r}; found {sorted(row)}")
            value = value[name]
        converted[field] = value
    for field, labels in data_set.labels.items():
        converted[field] = labels[converted[field]]
    return converted


def _write(file: pathlib.Path, rows: Sequence[Mapping]) -> None:
    """Writes JSON lines, or CSV with lists joined by semicolons, atomically."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{jax.process_index()}.unfinished")
    with unfinished.open("w", encoding="utf-8", newline="") as text:
        if file.suffix == ".csv":
            writer = csv.DictWriter(text, fieldnames=list(rows[0]))
            writer.writeheader()
            for row in rows:
                writer.writerow({name: "; ".join(of) if isinstance(of, list) else of for name, of in row.items()})
        else:
            text.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    unfinished.replace(file)
