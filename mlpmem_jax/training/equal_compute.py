"""Training settings that cost what a memory's training did, for what is compared with it."""

from __future__ import annotations

import ml_collections

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.models import flops, language_model, saved

_TRIED_SHARE = 1 / 8  # of the steps, for each learning rate that is tried


def flops_per_step(model: language_model.Config, settings: ml_collections.ConfigDict, length: int) -> float:
    """FLOPs of one optimizer step of a language model, forward and backward."""
    return float(3 * flops.language_model_forward(model, length) * settings.batch_sequences * length)


def settings_for(config: ml_collections.ConfigDict, memory: Artifact, base: Artifact) -> ml_collections.ConfigDict:
    """Settings for training the finished base, or adapters of it, for the memory's training FLOPs: AdamW, and otherwise
    those of the memory's training, with a tenth of the steps of warmup and another order of the sequences.

    Raises:
      UserError: the memory was imported, so that its training cost is not known.
    """
    if "training_flops" not in memory.summary:
        raise UserError(f"{memory.path}: was imported, so what its training cost, and its rivals' may, is not known")
    of_a_memory = ("mode", "alpha", "start")
    settings = ml_collections.ConfigDict(
        {key: value for key, value in config.training.items() if key not in of_a_memory}
    )
    per_step = flops_per_step(saved.language_model_config(base), settings, config.base.context_length)
    settings.steps = max(1, round(memory.summary["training_flops"] / per_step))
    settings.warmup_steps = min(settings.warmup_steps, settings.steps // 10)
    settings.optimizer = "adamw"
    settings.seed += 1
    return settings


def shortened(settings: ml_collections.ConfigDict, learning_rate: float) -> ml_collections.ConfigDict:
    """The settings of a short run that tries a learning rate."""
    short = settings.copy_and_resolve_references()
    short.learning_rate, short.steps = learning_rate, max(1, round(_TRIED_SHARE * settings.steps))
    short.warmup_steps = min(short.warmup_steps, short.steps // 10)
    return short
