"""Stage `train`: trains the memory on the kNN distributions, from stored inputs or with the base LM run in the step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.config import plain_dict
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.models import language_model, memory, saved
from mlpmem_jax.models.interpolation import perplexity, tune_weight
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.models.scoring import memory_log_probabilities
from mlpmem_jax.retrieval.datastore import block_at_depth, memory_inputs
from mlpmem_jax.training import data, loop
from mlpmem_jax.training.memory_task import dimensions, memory_task


class _Inputs(NamedTuple):
    """The artifacts on which the memory is trained; `start` is the memory that it starts from, if any."""

    tokens: Artifact
    base: Artifact
    datastore: Artifact
    targets: Artifact
    start: Artifact | None

    def fingerprints(self) -> dict[str, str]:
        names = ("base", "datastore", "targets") + (("start",) if self.start else ())
        return {name: getattr(self, name).fingerprint for name in names}


class _Start(NamedTuple):
    """The source of the parameters: dimensions, and the `initialize` and `start` of `loop`."""

    model: MemoryConfig
    initialize: Callable[..., dict] | None = None
    load: Callable[[], tuple] = tuple


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the memory of `config.workdir`."""
    return train(config, "memory")


def train(config: ml_collections.ConfigDict, folder: str) -> Artifact:
    """Trains a memory into a folder of `config.workdir`.

    Raises:
      UserError: an input is missing or contradicts the config.
    """
    workdir = epath.Path(config.workdir)
    inputs = _open_inputs(config)
    base = saved.language_model_config(inputs.base)
    block = _checked_input_block(config, inputs.datastore, base)

    settings = {"memory": plain_dict(config.memory), "training": loop.origin(config.training)}
    del settings["training"]["start"]  # the content matters, not its location
    if finished := find_finished(workdir / folder, "memory", settings, inputs.fingerprints()):
        say(f"{folder}: already finished")
        return finished

    sharding = Sharding.of(config)
    loop.check_batch(config.training, sharding, "training")
    start = _start(config, inputs, base, sharding)
    task = memory_task(config, start.model, base, sharding, start.initialize)
    is_online = config.training.mode == "online"
    writer = ArtifactWriter.create(workdir / folder, "memory", settings, inputs.fingerprints(), {})
    loop_run = loop.Run(
        name=folder,
        folder=writer.path,
        source=data.TargetSource(
            inputs.datastore, inputs.targets, TokenStream(inputs.tokens, "train") if is_online else None
        ),
        validate=_validation(config, start.model, sharding),
        frozen=saved.load_language_model(inputs.base.path, sharding)[0] if is_online else {},
        start=start.load,
    )
    parameters, summary = loop.fit(task, loop_run, sharding)

    summary["input_block"] = block  # fixes the block that the memory reads, whatever a later config says
    summary["positions"] = int(summary["steps"] * config.training.batch_sequences * config.base.context_length)
    before = inputs.start.summary.get("training_flops") if inputs.start else 0.0
    if before is not None:  # the cost of an imported memory is unknown, and so is that of what starts from it
        summary["training_flops"] = before + float(np.float64(summary["positions"]) * task.flops_per_position)
    return saved.seal(writer, start.model, parameters, summary)


def _open_inputs(config: ml_collections.ConfigDict) -> _Inputs:
    """Opens the artifacts of `config.workdir`, and the memory to start from.

    Raises:
      UserError: one is missing, or targets belong to another datastore.
    """
    workdir, start = epath.Path(config.workdir), config.training.start
    inputs = _Inputs(
        tokens=open_artifact(workdir / "tokens", "tokens"),
        base=open_artifact(workdir / "base", "base"),
        datastore=open_artifact(workdir / "datastore" / "train", "datastore"),
        targets=open_artifact(workdir / "targets" / "train", "targets"),
        start=open_artifact(start, "memory") if start else None,
    )
    inputs.datastore.check_made_from({"tokens": inputs.tokens, "base": inputs.base})
    inputs.targets.check_made_from({"datastore/train": inputs.datastore})
    return inputs


def _checked_input_block(config: ml_collections.ConfigDict, datastore: Artifact, base: language_model.Config) -> int:
    """The block of the base LM whose input the memory reads.

    Raises:
      ConfigError: the datastore has the inputs of another block.
    """
    block = block_at_depth(base.blocks, config.datastore.input_depth)
    stored = datastore.summary.get("input_block", block)  # datastores of earlier versions do not record it
    if block != stored:
        raise ConfigError(
            f"config.datastore.input_depth: {config.datastore.input_depth} is not that of {datastore.path}, which "
            f"holds the inputs of block {stored} of {base.blocks}; set it to {stored / base.blocks:.4g}, or "
            "delete the datastore and run its stage again"
        )
    return block


def _start(
    config: ml_collections.ConfigDict, inputs: _Inputs, base: language_model.Config, sharding: Sharding
) -> _Start:
    """Random parameters, those of a finished memory, or random ones with the output projection of the base LM.

    Raises:
      ConfigError: the memory or projection has other dimensions.
    """
    # Both offline and online, the memory reads the base LM's states, so its input has the base's width.
    vocab_size, tensor_shards = inputs.tokens.summary["vocab_size"], sharding.mesh.shape["tensor"]
    model = dimensions(config, vocab_size, base.width, tensor_shards, norm_epsilon=base.norm_epsilon)
    if inputs.start:
        path = inputs.start.path
        return _Start(
            model=_started_dimensions(inputs.start, model),
            initialize=lambda parameters: parameters,
            load=lambda: saved.load_memory(path, sharding)[:1],
        )
    if not config.memory.output_from_base:
        return _Start(model)
    if model.width != base.width:
        raise ConfigError(
            f"config.memory.output_from_base: needs config.memory.width ({model.width}) equal to the base's width "
            f"({base.width})"
        )
    init = functools.partial(memory.init, model, jax.random.key(config.training.seed))
    return _Start(
        model,
        # The base's vocabulary may be padded beyond the tokenizer's.
        initialize=lambda kernel_DxV: init(kernel_DxV[:, : model.vocab_size]),
        load=lambda: (language_model.output_kernel(saved.load_language_model(inputs.base.path, sharding)[0]),),
    )


def _started_dimensions(start: Artifact, model: MemoryConfig) -> MemoryConfig:
    """Dimensions of the memory that training starts from, which must match the config's."""
    stored = MemoryConfig(**start.summary["model"])
    for field in dataclasses.fields(MemoryConfig):
        expected, there = getattr(model, field.name), getattr(stored, field.name)
        if expected != there and field.name not in ("norm_epsilon", "activation"):
            raise ConfigError(
                f"config.training.start: {start.path} has {field.name} {there}, the config asks for {expected}; "
                "set config.memory to its values"
            )
    return stored


def _validation(
    config: ml_collections.ConfigDict, model: MemoryConfig, sharding: Sharding
) -> Callable[[dict], dict[str, float]]:
    """A function of parameters -> validation perplexity of the tuned mixture and of the memory alone, and lambda."""
    held_out = open_artifact(epath.Path(config.workdir) / "datastore" / "validation", "datastore")
    sequences = held_out.arrays["next_tokens"].shape[0]
    count = min(config.training.evaluation_sequences or sequences, sequences)
    inputs_NxD = held_out.read(memory_inputs(held_out), 0, count).reshape(-1, model.input_width)
    next_N = held_out.read("next_tokens", 0, count).reshape(-1)
    base_N = held_out.read("base_log_probabilities", 0, count).reshape(-1)

    dtype = held_out.config.get("compute_dtype", "float32")  # the dtype of the base's scores

    def validate(parameters) -> dict[str, float]:
        memory_N = memory_log_probabilities(
            parameters, model, inputs_NxD, next_N, sharding=sharding, compute_dtype=dtype
        )
        weight, mixed = tune_weight(base_N, memory_N)
        return {
            "perplexity": mixed,
            "perplexity_augmented": mixed,
            "perplexity_memory": float(perplexity(memory_N)),
            "perplexity_base": float(perplexity(base_N)),
            "interpolation_weight": weight,
        }

    return validate
