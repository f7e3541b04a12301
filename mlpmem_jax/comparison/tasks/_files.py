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
    """The text of a file, or of its compressed version (with one more file name extension).

    Raises:
      UserError: the file does not exist or cannot be read.
    """
    candidates = [file, *(file.with_name(file.name + end) for end in compression.COMPRESSED)]
    existing = next((candidate for candidate in candidates if candidate.exists()), None)
    if existing is None:
        raise UserError(f"{file}: does not exist, compressed ({', '.join(compression.COMPRESSED)}) or not; "
                        "config.comparison.data is the folder of task files (docs/evaluation.md)")  # fmt: skip
    try:
        with existing.open("rb") as raw:
            return compression.decompress(raw, existing.suffix).read().decode("utf-8-sig")
    except (*compression.ERRORS, UnicodeDecodeError) as error:
        raise UserError(f"{existing}: could not be read: {error}") from error


def read_rows(file: pathlib.Path, texts: Sequence[str], others: Sequence[str] = ()) -> list[dict]:
    """The rows of a file; each must have the fields `texts`, which are text, and `others`, which are anything but null.

    Raises:
      UserError: the file is missing or damaged, or a row (which the message names) lacks a field or has an unsuitable
        one.
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
        fields = row if isinstance(row, dict) else {}
        if lacking := [field for field in (*texts, *others) if fields.get(field) is None]:
            raise UserError(f"{file}: row {number} has no {', '.join(lacking)}")
        if wrong := [field for field in texts if not isinstance(fields[field], str)]:
            found = type(fields[wrong[0]]).__name__
            raise UserError(f"{file}: row {number}: expected text at {wrong[0]!r}, found a {found}")
        if not _is_unicode(json.dumps(row, ensure_ascii=False)):
            raise UserError(f"{file}: row {number} has half of a surrogate pair (\\ud800 to \\udfff), which is no text")
    if not rows:
        raise UserError(f"{file}: has no rows")
    return rows


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
