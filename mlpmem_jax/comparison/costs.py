"""What a system cost to make, and what it takes to keep."""

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
      config: of the working directory.
      parts: its artifacts by role.
      seconds: of scoring and generation.
      passages_bytes: of its passages and what finds them; 0 without.

    Returns:
      training_flops: of what was trained for it, without the base LM.
      construction_flops: of the datastore and the neighbors of its positions, which a memory is trained on.
      parameters: that are read for one token.
      bytes: on disk, the base LM included, and of passages.
      seconds: as given.
    """
    base, construction = saved.language_model_config(parts["model"]), 0.0
    if "targets" in parts:
        sequences, length = parts["datastore"].arrays["next_tokens"].shape
        backend = parts["targets"].summary.get("backend", config.targets.backend)
        targets = config.targets.to_dict()
        construction = budgets.construction(base, None, length, sequences * length, backend, targets)
    # A memory was made from the datastore and its targets, but needs neither any more.
    kept = ("model", "memory") if "memory" in parts else ("model", "datastore")
    return {
        "training_flops": sum(artifact.summary.get("training_flops", 0.0) for artifact in parts.values()),
        "construction_flops": construction,
        "parameters": sum(parts[role].summary["parameter_count"] for role in ("model", "memory") if role in parts),
        "bytes": sum(provenance.artifact_bytes(parts[role]) for role in kept if role in parts) + passages_bytes,
        "seconds": seconds,
    }  # fmt: skip
