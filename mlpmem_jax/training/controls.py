"""The controls: what the same training compute gives without a memory, and a memory without the retriever's targets.

`continued`: the base LM trained on, for as many FLOPs as the memory's training took (GPT2-ConTrain of the paper).
`ce_only`: the same memory trained by cross entropy alone (alpha = 0).
"""

from __future__ import annotations

import ml_collections
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.runtime import measured_stage
from mlpmem_jax.models import flops, saved
from mlpmem_jax.training import continued as continued_training
from mlpmem_jax.training import memory

CONTINUED, CE_ONLY = "controls/continued", "controls/ce_only"


_RATES = (1e-5, 3e-5, 1e-4)  # peak learning rates that are tried for a base that was trained elsewhere
_TRIED_SHARE = 1 / 8  # of the steps, for each of them


def continued(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the finished base on, with a fresh schedule, for the memory's training FLOPs.

    A base that was trained here is trained on with its own settings. One that was imported takes those of the memory's
    training, with AdamW, a tenth of warmup, and the learning rate that is the best on validation after short runs; what
    those cost comes on top.
    """
    workdir = epath.Path(config.workdir)
    trained, base = open_artifact(workdir / "memory", "memory"), open_artifact(workdir / "base", "base")
    if "training_flops" not in trained.summary:
        raise UserError(f"{trained.path}: was imported, so what its training cost, and `continued` may, is not known")
    is_imported = config.base.source != "train"
    group = "training" if is_imported else "base.training"
    settings = ml_collections.ConfigDict(config.base.training)
    if is_imported:
        settings = continued_training.settings_of(config)
    length = config.base.context_length
    model = saved.language_model_config(base)
    per_step = 3 * flops.language_model_forward(model, length) * settings.batch_sequences * length
    settings.steps = max(1, round(trained.summary["training_flops"] / per_step))
    settings.warmup_steps = min(settings.warmup_steps, settings.steps // 10)
    settings.seed += 1  # another order of the sequences
    inputs = {"memory": trained.fingerprint}
    if is_imported:
        settings.optimizer = "adamw"
        settings.learning_rate = _best_rate(config, settings, inputs, group)
    return continued_training.train_on(config, settings, CONTINUED, inputs, group)


def _best_rate(config: ml_collections.ConfigDict, settings: ml_collections.ConfigDict, inputs, group: str) -> float:
    """The learning rate whose short run has the lowest validation perplexity."""
    perplexities = {}
    for rate in _RATES:
        short = ml_collections.ConfigDict(settings)
        short.learning_rate, short.steps = rate, max(1, round(_TRIED_SHARE * settings.steps))
        short.warmup_steps = min(short.warmup_steps, short.steps // 10)
        tried = continued_training.train_on(config, short, f"{CONTINUED}_rates/{rate:g}", inputs, group)
        perplexities[rate] = tried.summary["perplexity"]["validation"]
    best = min(perplexities, key=perplexities.get)
    tries = ", ".join(f"{rate:g}: {perplexity:.2f}" for rate, perplexity in perplexities.items())
    say(f"{CONTINUED}: learning rate {best:g}; validation perplexity of short runs by rate: {tries}")
    return best


def ce_only(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the config's memory again, from the same start, without the distributions."""
    config = config.copy_and_resolve_references()
    config.training.alpha = 0.0
    return memory.train(config, CE_ONLY)


def run(config: ml_collections.ConfigDict) -> None:
    """Trains both controls; `mlpmem evaluate` reports them beside the memory.

    Raises:
      UserError: the memory is not finished.
    """
    for name, control in ((CONTINUED, continued), (CE_ONLY, ce_only)):
        say(f"== {name}")
        with measured_stage(config.workdir, name):
            control(config)
