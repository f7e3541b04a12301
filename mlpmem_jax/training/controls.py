"""The controls: what the same training compute gives without a memory, and a memory without the retriever's targets.

`continued`: the base LM trained on, for as many FLOPs as the memory's training took (GPT2-ConTrain of the paper).
`ce_only`: the same memory trained by cross entropy alone (alpha = 0).
"""

from __future__ import annotations

import ml_collections
from etils import epath

from mlpmem_jax.core import config as configs
from mlpmem_jax.core import mesh as meshes
from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.runtime import measured_stage
from mlpmem_jax.models import flops, saved
from mlpmem_jax.training import base, memory

CONTINUED, CE_ONLY = "controls/continued", "controls/ce_only"


def continued(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the finished base on, with its own settings and a fresh schedule, for the memory's training FLOPs."""
    workdir = epath.Path(config.workdir)
    trained = open_artifact(workdir / "memory", "memory")
    mesh, rules = meshes.mesh_of(config)
    parameters, model, artifact = saved.load_language_model(workdir / "base", mesh, rules)
    settings = ml_collections.ConfigDict(config.base.training)
    length = config.base.context_length
    per_step = 3 * flops.language_model_forward(model, length) * settings.batch_sequences * length
    settings.steps = max(1, round(trained.summary["training_flops"] / per_step))
    settings.warmup_steps = min(settings.warmup_steps, settings.steps // 10)
    settings.seed += 1  # another order of the sequences
    kept = {"training": configs.plain(settings)}
    inputs = {"base": artifact.fingerprint, "memory": trained.fingerprint}
    if finished := find_finished(workdir / CONTINUED, "base", kept, inputs):
        say(f"{CONTINUED}: finished already")
        return finished
    writer = ArtifactWriter.create(workdir / CONTINUED, "base", kept, inputs, {})
    best, figures = base.train(config, settings, CONTINUED, writer.path, model, lambda: parameters)
    figures["training_flops"] = float(per_step) * figures["steps"]
    saved.seal(writer, model, best, figures)
    return open_artifact(workdir / CONTINUED, "base")


def ce_only(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the config's memory again, from the same start, without the distributions."""
    config = ml_collections.ConfigDict(config)
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
