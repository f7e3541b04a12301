"""Files of JSON lines that a killed process may have left with half a last line."""

from __future__ import annotations

import json

from etils import epath


def read(file: epath.Path) -> list[dict]:
    """The objects of a file; none where it does not exist. A last line that a kill truncated is left out."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
