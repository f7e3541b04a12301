"""Estimates a run's storage, host memory and chip-hours from dimensions alone, without compiling."""

from __future__ import annotations

import dataclasses
import math

import ml_collections
import numpy as np

from mlpmem_jax.core.accelerators import resolve
from mlpmem_jax.core.chips import CHIPS
from mlpmem_jax.models import flops, language_model
from mlpmem_jax.planning import programs
from mlpmem_jax.retrieval import backends, needs
from mlpmem_jax.retrieval.key_shards import Search
from mlpmem_jax.training import continued, data, loop

MEAN_ENTRIES = 251
"""Mean number of tokens in a kNN distribution at k = 1024, for GPT-2 large on WikiText-103 (the paper)."""

_TRAINED_BYTES = 4.0 + 2 * 12.0
"""Bytes per trained parameter: in float32, and in two checkpoints with the optimizer's moments."""


@dataclasses.dataclass(frozen=True)
class ArtifactCost:
    """Bytes of an artifact in storage, and of its stage's largest arrays in the memory of one host.

    Attributes:
      is_kept: whether it is still there when its stage is finished.
    """

    name: str
    storage: float
    host: float
    note: str
    is_kept: bool = True


@dataclasses.dataclass(frozen=True)
class RunCost:
    """The cost of a whole run: chip-hours at an assumed utilization, and bytes of storage when it is finished."""

    chip_hours: float
    storage: float
    training_flops: float
    steps: int


def artifacts(
    config: ml_collections.ConfigDict, positions: int, hosts: int, cpus: int | None = None
) -> list[ArtifactCost]:
    """Storage and memory of every stage.

    Args:
      config: the whole config.
      positions: positions of the training split.
      hosts: number of hosts, which run one process each.
      cpus: CPUs of a host; None for those of this one.
    """
    models = programs.models_of(config, 1)
    length, settings = config.base.context_length, config.datastore
    total = positions * (1 + config.corpus.validation_fraction + config.corpus.test_fraction)
    token = 2 if models.base.vocab_size <= 2**16 else 4
    widths = models.keys.width + models.separate_inputs * models.base.width
    position = 2 * widths + 8  # 16-bit arrays, and the next token and the document as int32
    most = programs.most_entries(config, models)
    entries = min(most, MEAN_ENTRIES * config.targets.k / 1024)
    base = language_model.parameter_count(models.base)
    keys = language_model.parameter_count(models.keys) if settings.key_model else 0
    parameters = flops.memory_parameters(models.memory)
    batch = programs.batch_of_memory(config, models, max(1, config.training.batch_sequences // hosts))
    batch_bytes = sum(math.prod(array.shape) * array.dtype.itemsize for array in batch.values())
    ahead = data.read_ahead(batch_bytes)
    validated = programs.validated_positions(config, positions) * (2 * models.base.width + 4 + 4)
    targets = total * (4 + 4 + (token + 2) * entries)
    return [
        ArtifactCost("tokens", total * token, 0, f"{token} bytes per token"),
        ArtifactCost("base", 4.0 * (base + keys), 4.0 * (base + keys) / hosts, "float32, including the key model"),
        ArtifactCost(
            "datastore",
            total * position,
            2.0 * settings.sequences_per_shard * length * position,
            f"{widths} numbers of {settings.dtype} per position; two shards in memory",
        ),
        _targets_while_built(
            config, models, positions, total, targets, targets_memory(config, models, positions, hosts, cpus)
        ),
        ArtifactCost("targets", targets, 0, f"about {entries:.0f} entries per position, at most {most}"),
        ArtifactCost(
            "memory",
            _TRAINED_BYTES * parameters,
            (1 + ahead) * batch_bytes + validated,
            "parameters, and two checkpoints with the optimizer's moments; in memory a batch, "
            f"{ahead} more read ahead, and the validation split's inputs",
        ),
    ]


def _targets_while_built(
    config: ml_collections.ConfigDict,
    models: programs.ModelDimensions,
    positions: int,
    queries: float,
    targets: float,
    memory: int,
) -> ArtifactCost:
    """The folder of the targets at its largest: indices, and neighbors that targets replace one by one."""
    settings, length, width = config.targets, config.base.context_length, models.keys.width
    search = Search.create(backends.planned(settings.backend), settings)
    key_bytes = np.dtype(config.datastore.dtype).itemsize
    sequences, most_rows = max(1, positions // length), settings.key_shard_rows
    scratch = needs.of_scratch(search, sequences, length, round(queries), most_rows, width, key_bytes, settings.k)
    return ArtifactCost(
        "targets, while built",
        scratch.indices + max(scratch.neighbors, targets),
        memory,
        f"at most: {scratch.indices / 1e9:,.1f} GB of indices, {scratch.neighbors / 1e9:,.1f} GB of neighbors between "
        "shards of keys; in memory one shard of keys with its index",
        is_kept=False,
    )


def targets_memory(
    config: ml_collections.ConfigDict,
    models: programs.ModelDimensions,
    positions: int,
    processes: int,
    cpus: int | None = None,
) -> int:
    """Bytes of memory that stage `targets` takes at most in each process of a job, which has `cpus` CPUs."""
    settings = config.targets
    search = Search.create(backends.planned(settings.backend), settings)
    rows, key_bytes = min(positions, settings.key_shard_rows), np.dtype(config.datastore.dtype).itemsize
    entries = programs.most_entries(config, models)
    load = needs.Workload(config.datastore.sequences_per_shard * config.base.context_length, settings.k, entries)
    return needs.of_process(search, rows, models.keys.width, key_bytes, load, processes, cpus).memory


def estimate(
    config: ml_collections.ConfigDict,
    positions: int,
    topology: str,
    slices: int = 1,
    utilization: float = 0.5,
    arm: str = "augmented",
) -> RunCost:
    """Chip-hours of training the base and an arm's model, and the storage of all their artifacts.

    Args:
      config: the whole config; `config.workdir` is not read.
      positions: positions of the training split.
      topology: an accelerator as in `core.accelerators.resolve`.
      slices: number of slices.
      utilization: assumed model FLOPs over peak FLOPs.
      arm: "augmented", a memory with its datastore, or "continued", the base trained further, which needs neither.

    Raises:
      UserError: the topology, or the dimensions of the base, are unknown.
    """
    tpu = resolve(topology, "--topology")
    models, length = programs.models_of(config, 1), config.base.context_length
    costs = artifacts(config, positions, tpu.hosts * slices)
    stored = {artifact.name: artifact.storage for artifact in costs if artifact.is_kept}
    if arm == "continued":
        settings = continued.settings_of(config)
        per_position = 3 * language_model.forward_flops(models.base, length)
        forward = 0
        parameters = language_model.parameter_count(models.base)
        stored = {"tokens": stored["tokens"], "base": 4.0 * parameters, "continued": _TRAINED_BYTES * parameters}
    else:
        settings = config.training
        per_position = 3 * flops.memory_forward(models.memory)
        forward = language_model.forward_flops(models.base, length, output_projection=False)
        if settings.mode == "online":
            per_position += forward
        if config.datastore.key_model:
            forward += language_model.forward_flops(models.keys, length, output_projection=False)
    steps = loop.total_steps(settings, positions // length)
    per_step = float(settings.batch_sequences * length * per_position)
    training, total = steps * per_step, float(positions) * forward
    is_searched = arm == "continued" and config.base.source != "train"  # for the best learning rate
    total += per_step * (continued.steps_with_rate_search(steps) if is_searched else steps)
    total += 3.0 * programs.base_positions(config, positions) * language_model.forward_flops(models.base, length)
    return RunCost(
        chip_hours=total / (CHIPS[tpu.family].flops * utilization) / 3600,
        storage=sum(stored.values()),
        training_flops=training,
        steps=steps,
    )
