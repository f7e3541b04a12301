"""Writes the report of an evaluation: metrics.json, and a page and plots made from it."""

from __future__ import annotations

import json

import jax
from etils import epath

from mlpmem_jax.evaluation import figures
from mlpmem_jax.evaluation.page import page


def write(folder, metrics: dict) -> epath.Path:
    """Writes metrics.json, index.html and two plots, each atomically, on the first process only.

    Args:
      folder: created if missing.
      metrics: the metrics that `evaluate.run` gathers; JSON values.

    Returns:
      The folder.
    """
    folder = epath.Path(folder)
    if jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        encoded = json.dumps(metrics, indent=1, sort_keys=True, allow_nan=False) + "\n"
        contents = {
            "overview.png": figures.overview(metrics),
            "breakdown.png": figures.breakdown_overview(metrics),
            "index.html": page(metrics).encode(),
            "metrics.json": encoded.encode(),
        }
        for name, content in contents.items():
            partial = folder / f"{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)
    return folder


def is_there(folder, metrics: dict) -> bool:
    """Whether the folder holds the report of the same artifacts, evaluated with the same settings."""
    try:
        stored = json.loads((epath.Path(folder) / "metrics.json").read_bytes())
        return all(
            stored[group][name] == metrics[group][name]
            for group, name in (("provenance", "fingerprints"), ("config", "evaluation"))
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False
