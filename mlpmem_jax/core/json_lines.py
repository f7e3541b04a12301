"""Reads JSON lines files in which a killed process or a disk error may have left damaged lines."""

from __future__ import annotations

import json
from collections.abc import Iterable

from etils import epath


def read(file: epath.Path) -> list[dict]:
    """The objects of a file; none if it does not exist. Damaged lines are skipped."""
    return parsed(file.read_bytes().splitlines()) if file.exists() else []


def parsed(lines: Iterable[bytes]) -> list[dict]:
    """The objects of lines; damaged lines are skipped."""
    return [record for line in lines if (record := _object(line)) is not None]


def _object(line: bytes) -> dict | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
