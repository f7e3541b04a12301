"""The interpolation weight lambda of a finished memory, the same wherever it is used."""

from __future__ import annotations

import json
from typing import NamedTuple

from etils import epath

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.errors import ArtifactError


class Weight(NamedTuple):
    """Lambda, and a description of where it is stored and what it was tuned on."""

    value: float
    source: str


def find_weight(workdir, memory: Artifact) -> Weight:
    """The lambda of a memory: from the report (tuned on the whole validation split), else from the end of its training.

    Args:
      workdir: the workdir, whose report is read if there is one.
      memory: the finished memory; a report about another memory is ignored.
    """
    if report := read_report(workdir, memory):
        value = report["interpolation_weight"]["memory"]
        return Weight(value, f"from {_file(workdir)}, tuned on the validation split")
    value = memory.summary["validation"]["interpolation_weight"]
    tuned = "imported with it" if memory.is_imported else "tuned on the validation split during training"
    return Weight(value, f"from {memory.path}, {tuned}; `evaluate` has not been run on it")


def read_report(workdir, memory: Artifact) -> dict | None:
    """The contents of report/metrics.json, if it is about this memory.

    Raises:
      ArtifactError: the file is damaged.
    """
    file = _file(workdir)
    if not file.exists():
        return None
    try:
        metrics = json.loads(file.read_bytes())
        is_of_memory = metrics["provenance"]["fingerprints"].get("memory") == memory.fingerprint
        if is_of_memory and not 0 <= metrics["interpolation_weight"]["memory"] <= 1:
            raise ValueError("a lambda outside 0 to 1")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{file}: edited or corrupt ({error}); delete it, or run `evaluate` again") from error
    return metrics if is_of_memory else None


def _file(workdir) -> epath.Path:
    return epath.Path(workdir) / "report" / "metrics.json"
