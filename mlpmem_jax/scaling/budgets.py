"""Training compute: optimizer steps that a FLOP budget pays for, and FLOPs spent, from the dimensions.

There are two counts. `training`: forward and backward passes of the trained model. `construction`: building a memory's
inputs and targets beforehand, on the training split: forward passes of the base and of the key model, building the
index, and the search. Neither includes validation or evaluation.
"""

from __future__ import annotations

import math

import ml_collections

from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.interop import published
from mlpmem_jax.models import flops, language_model
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval import backends
from mlpmem_jax.retrieval.key_shards import Search
from mlpmem_jax.training import memory_task, train_base

COUNTED = ("training", "training and targets")


def base_model(config: ml_collections.ConfigDict) -> language_model.Config:
    """Dimensions of the base that a config describes or names."""
    if config.base.source != "train":
        return _published(config.base.path, "base.path")
    return train_base.dimensions(config, config.tokenizer.vocab_size)


def _published(path: str, key: str) -> language_model.Config:
    try:
        return published.dimensions(path)
    except UserError as error:
        raise ConfigError(
            f"config.{key}: the dimensions of {path!r} are unknown until it is imported, so a budget cannot be "
            f"converted to steps: {error}"
        ) from error


def memory_model(config: ml_collections.ConfigDict) -> MemoryConfig:
    """Dimensions of the memory that a config describes."""
    base = base_model(config)
    return memory_task.dimensions(config, base.vocab_size, base.width, max(1, config.mesh.tensor))


def per_position(arm: str, config: ml_collections.ConfigDict) -> int:
    """FLOPs per position of a training step of the model that the arm trains."""
    if arm == "continued":
        return 3 * language_model.forward_flops(base_model(config), config.base.context_length)
    return 3 * flops.memory_forward(memory_model(config))


def steps(arm: str, config: ml_collections.ConfigDict, budget: float, construction_flops: float) -> int:
    """The number of optimizer steps that a budget pays for.

    Args:
      arm: "continued" or "augmented".
      config: the point's config.
      budget: in FLOPs.
      construction_flops: FLOPs of construction, which are deducted from the budget first.

    Raises:
      ConfigError: the budget does not pay for one step.
    """
    positions = config.training.batch_sequences * config.base.context_length
    per_step = per_position(arm, config) * positions
    left = budget - construction_flops
    if left < per_step:
        of = f", of which {construction_flops:.3g} go to the targets," if construction_flops else ""
        raise ConfigError(
            f"flops: a budget of {budget:.3g} FLOPs{of} is too small for one step, which takes {per_step:.3g} "
            f"({positions:,} positions); raise it, or lower config.training.batch_sequences"
        )
    return round(left / per_step)


def planned_construction(config: ml_collections.ConfigDict, positions: int) -> float:
    """FLOPs of building inputs and targets for `positions` training positions, from the config alone."""
    key_model = None
    if config.datastore.key_model:
        key_model = _published(config.datastore.key_model, "datastore.key_model")
    backend, targets = config.targets.backend, config.targets.to_dict()
    return construction(base_model(config), key_model, config.base.context_length, positions, backend, targets)


def construction(
    base: language_model.Config,
    key_model: language_model.Config | None,
    length: int,
    positions: int,
    backend: str,
    targets: dict,
    queries: int | None = None,
) -> float:
    """FLOPs of building inputs and targets of the training split.

    Args:
      base: dimensions of the base.
      key_model: dimensions of the key model; None if it is the base.
      length: positions per sequence.
      positions: N, the number of keys.
      backend: the search backend, as in config.targets.
      targets: the settings config.targets.
      queries: the number of queries; None = one per key.
    """
    models = [base] if key_model is None else [base, key_model]
    forward = sum(language_model.forward_flops(model, length, output_projection=False) for model in models)
    queries = positions if queries is None else queries
    return float(positions) * forward + _search(models[-1].width, positions, queries, backend, targets)


def _search(width: int, positions: int, queries: int, backend: str, targets: dict) -> float:
    """FLOPs of indexing N keys of the given width, and of running all queries on each index."""
    shards = math.ceil(positions / targets["key_shard_rows"])
    search = Search.create(backends.planned(backend), targets)
    return shards * search.flops(math.ceil(positions / shards), width, queries)
