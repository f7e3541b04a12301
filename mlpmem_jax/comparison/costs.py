"""What a system costs to build and to store."""

from __future__ import annotations

import ml_collections

from mlpmem_jax.comparison.searching import EXACT
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.evaluation import provenance
from mlpmem_jax.models import saved
from mlpmem_jax.scaling import budgets


def cost(
    config: ml_collections.ConfigDict, parts: dict[str, Artifact], seconds: float, passages_bytes: int = 0
) -> dict:
    """FLOPs, parameters, bytes and seconds of a system.

    Args:
      config: the working directory's config.
      parts: the system's artifacts by role, from `systems.Workdir.parts`.
      seconds: wall time of scoring and generation.
      passages_bytes: size of its passages and their index; 0 without retrieval.

    Returns:
      training_flops: FLOPs of the models trained for it, not counting the base LM, nor its fine-tuning.
      construction_flops: FLOPs of building the datastore, and of searching the neighbors that a memory is trained on or
        building the index that kNN-LM searches.
      parameters: number of parameters read per generated token.
      bytes: size on disk, including the base LM and the passages.
      seconds: as given.
    """
    # A memory is built from the datastore and its targets but no longer needs either once trained.
    kept = ("base", "model", "memory" if "memory" in parts else "datastore")
    return {
        "training_flops": sum(
            parts[role].summary.get("training_flops", 0.0) for role in ("model", "memory") if role in parts
        ),
        "construction_flops": _construction(config, parts) if "datastore" in parts else 0.0,
        "parameters": sum(
            parts[role].summary["parameter_count"] for role in ("base", "model", "memory") if role in parts
        ),
        "bytes": sum(provenance.artifact_bytes(parts[role]) for role in kept if role in parts) + passages_bytes,
        "seconds": seconds,
    }


def _construction(config: ml_collections.ConfigDict, parts: dict[str, Artifact]) -> float:
    sequences, length = parts["datastore"].arrays["next_tokens"].shape
    positions, targets = sequences * length, {**config.targets.to_dict(), **parts["targets"].config}
    backend, queries = targets["backend"], None
    if "memory" not in parts:  # kNN-LM searches while it answers; up to EXACT keys are not indexed before
        backend, queries = "exact" if positions <= EXACT else backend, 0
    key_model = saved.language_model_config(parts["key_model"]) if "key_model" in parts else None
    base = saved.language_model_config(parts["base"])
    return budgets.construction(base, key_model, length, positions, backend, targets, queries)
