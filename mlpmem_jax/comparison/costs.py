"""What a system costs to build and to store."""

from __future__ import annotations

import ml_collections

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
      parts: the system's artifacts by role.
      seconds: wall time of scoring and generation.
      passages_bytes: size of its passages and their index; 0 without retrieval.

    Returns:
      training_flops: FLOPs of the models trained for it, not counting the base LM.
      construction_flops: FLOPs of building the datastore and of searching the neighbors that a memory is trained on.
      parameters: number of parameters read per generated token.
      bytes: size on disk, including the base LM and the passages.
      seconds: as given.
    """
    base, construction = saved.language_model_config(parts["model"]), 0.0
    if "targets" in parts:
        sequences, length = parts["datastore"].arrays["next_tokens"].shape
        backend = parts["targets"].summary.get("backend", config.targets.backend)
        targets = config.targets.to_dict()
        construction = budgets.construction(base, None, length, sequences * length, backend, targets)
    # A memory is built from the datastore and its targets but no longer needs either once trained.
    kept = ("model", "memory") if "memory" in parts else ("model", "datastore")
    return {
        "training_flops": sum(artifact.summary.get("training_flops", 0.0) for artifact in parts.values()),
        "construction_flops": construction,
        "parameters": sum(parts[role].summary["parameter_count"] for role in ("model", "memory") if role in parts),
        "bytes": sum(provenance.artifact_bytes(parts[role]) for role in kept if role in parts) + passages_bytes,
        "seconds": seconds,
    }  # fmt: skip
