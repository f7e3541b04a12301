"""Rows of the published files of tasks: JSON lines, a JSON list, or CSV, compressed or not."""

from __future__ import annotations

import csv
import io
import json
import pathlib
from collections.abc import Sequence

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.corpus import compression


def read_text(file: pathlib.Path) -> str:
    """The text of a file, or of the compressed file whose name has one more ending.

    Raises:
      UserError: it is not there, or cannot be read.
    """
    found = next((one for one in (file, *(file.with_name(file.name + end) for end in compression.COMPRESSED))
                  if one.exists()), None)  # fmt: skip
    if found is None:
        raise UserError(f"{file}: does not exist, compressed ({', '.join(compression.COMPRESSED)}) or not; "
                        "config.comparison.data names the folder of the tasks' files (docs/evaluation.md)")  # fmt: skip
    try:
        with found.open("rb") as raw:
            return compression.decompress(raw, found.suffix).read().decode()
    except (*compression.ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"{found}: could not be read: {error}") from error


def read_rows(file: pathlib.Path, fields: Sequence[str]) -> list[dict]:
    """The rows of a file, each of which has all of `fields`.

    Raises:
      UserError: the file is not there or damaged, or a row lacks a field; names the row.
    """
    text = read_text(file)
    try:
        if file.suffix == ".csv":
            rows = list(csv.DictReader(io.StringIO(text)))
        elif text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except (json.JSONDecodeError, csv.Error) as error:
        raise UserError(f"{file}: expected rows of JSON or CSV: {error}") from error
    for number, row in enumerate(rows, start=1):
        lacking = [field for field in fields if not isinstance(row, dict) or field not in row]
        if lacking:
            raise UserError(f"{file}: row {number} has no {', '.join(lacking)}")
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows
