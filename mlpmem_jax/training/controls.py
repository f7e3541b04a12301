"""The controls: the same training compute without a memory, and a memory without the retriever's targets.

`continued`: the base LM trained further, for as many FLOPs as the memory's training (the paper's GPT2-ConTrain).
`ce_only`: the same memory trained with cross entropy only (alpha = 0).
"""

from __future__ import annotations

import ml_collections
from etils import epath

from mlpmem_jax.core import stage_costs
from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say
from mlpmem_jax.models import saved
from mlpmem_jax.training import continued as continued_training
from mlpmem_jax.training import train_memory

CONTINUED, CE_ONLY = "controls/continued", "controls/ce_only"


def continued(config: ml_collections.ConfigDict) -> Artifact:
    """Continues training the finished base, with a fresh schedule, for the memory's training FLOPs.

    A base that was trained here keeps its own settings. An imported one uses those of the memory's training, with AdamW
    and the best of a few small learning rates; the FLOPs of that search are extra, and its summary reports them.
    """
    workdir = epath.Path(config.workdir)
    trained, base = open_artifact(workdir / "memory", "memory"), open_artifact(workdir / "base", "base")
    training_flops = continued_training.flops_of_memory(trained, base)
    is_imported = base.is_imported or config.base.source != "train"
    settings = ml_collections.ConfigDict(config.training if is_imported else config.base.training)
    model, length = saved.language_model_config(base), config.base.context_length
    per_step = continued_training.flops_per_step(model, length, settings)
    steps = max(1, round(training_flops / per_step))
    group, rates = "base.training", ()
    if is_imported:
        settings = continued_training.small_steps(continued_training.settings_of(config), steps)
        group, rates = "training", continued_training.RATES
    else:
        settings.update({"steps": steps, "warmup_steps": min(settings.warmup_steps, steps // 10)})
    settings.profile_steps = ""  # the control's number of steps differs
    settings.seed = (settings.seed + 1) % 2**32  # a different order of sequences
    inputs = {"memory": trained.fingerprint}
    return continued_training.train_on(config, settings, CONTINUED, inputs, group, rates=rates)


def ce_only(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the config's memory again, from the same initialization, without the target distributions.

    Raises:
      ConfigError: the initialization is another memory, which may have been trained on such distributions.
    """
    if config.training.start:
        raise ConfigError(
            f"config.training.start: {CE_ONLY} would start from {config.training.start}, which may have learned "
            "the retriever's targets already; no such control exists"
        )
    config = config.copy_and_resolve_references()
    config.training.alpha = 0.0
    return train_memory.train(config, CE_ONLY)


def run(config: ml_collections.ConfigDict) -> None:
    """Trains both controls, the second unless the memory started from another one; `mlpmem evaluate` reports them.

    Raises:
      UserError: the memory is not finished.
    """
    for name, control in ((CONTINUED, continued), (CE_ONLY, ce_only)):
        if config.training.start and control is ce_only:
            say(f"{name}: left out, because the memory of config.training.start may have been trained on the targets")
            continue
        say(f"== {name}")
        with stage_costs.measured(config.workdir, name):
            control(config)
