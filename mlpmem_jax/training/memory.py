"""Stage `train`: the memory learns the kNN distributions, from stored inputs or with the base LM in the step."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import config as configs
from mlpmem_jax.core.artifacts import Artifact, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.models import flops, language_model, memory, parallel_memory, saved
from mlpmem_jax.models.interpolation import perplexity, tune_weight
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.models.scoring import memory_log_probabilities
from mlpmem_jax.retrieval.datastore import tapped_block
from mlpmem_jax.training import data, loop
from mlpmem_jax.training.loss import sparse_cross_entropy

_TILE = 128  # columns of a matrix unit


def vocabulary_multiple(tensor_shards: int) -> int:
    """What the padded vocabulary is a multiple of: whole tiles, and what the mesh divides."""
    return math.lcm(_TILE, tensor_shards)


def dimensions(
    config: ml_collections.ConfigDict,
    vocab_size: int,
    input_width: int,
    tensor_shards: int,
    norm_epsilon: float = 1e-5,
) -> MemoryConfig:
    """The memory's dimensions; the vocabulary is padded to what the mesh divides, `norm_epsilon` is the base's.

    Any `tensor` size that is a power of two up to 128 gives the same, so that a run may resume on another mesh.
    """
    multiple = vocabulary_multiple(tensor_shards)
    return MemoryConfig(
        family=config.memory.family,
        vocab_size=vocab_size,
        padded_vocab_size=-(-vocab_size // multiple) * multiple,
        input_width=input_width,
        width=config.memory.width,
        blocks=config.memory.blocks,
        feed_forward_width=config.memory.feed_forward_width or 4 * config.memory.width,
        norm_epsilon=norm_epsilon,
        activation="gelu_new" if config.memory.family == "gpt2" else "silu",
    )


def _started(artifact: Artifact, model: MemoryConfig) -> MemoryConfig:
    """Dimensions of the memory that training starts from, which must be as large as the config's."""
    found = MemoryConfig(**artifact.summary["model"])
    for field in dataclasses.fields(MemoryConfig):
        expected, there = getattr(model, field.name), getattr(found, field.name)
        if expected != there and field.name not in ("norm_epsilon", "activation"):
            raise ConfigError(
                f"config.training.start: {artifact.path} has {field.name} {there}, the config asks for {expected}; "
                "set config.memory to what is there"
            )
    return found


def _loss(model: MemoryConfig, base_config, input_tap, training, sharding, parameters, frozen, batch):
    dtype = jnp.dtype(training.compute_dtype)
    if training.mode == "online":
        base = jax.lax.stop_gradient(frozen)
        _, tapped = language_model.features(base, base_config, batch["tokens"], taps=(input_tap,), compute_dtype=dtype)
        inputs_BxTxD = tapped[input_tap]
    else:
        inputs_BxTxD = batch["memory_inputs"]
    inputs_NxD = inputs_BxTxD.reshape(-1, model.input_width).astype(dtype)
    hidden_NxD = parallel_memory.hidden(
        parameters, model, inputs_NxD, sharding=sharding, compute_dtype=dtype, remat=training.remat
    )
    entries = batch["token_ids"].shape[-1]
    return sparse_cross_entropy(
        hidden_NxD.astype(dtype),
        memory.output_kernel(parameters),
        batch["token_ids"].reshape(-1, entries),
        batch["probabilities"].reshape(-1, entries),
        batch["next_tokens"].reshape(-1),
        alpha=training.alpha,
        vocab_size=model.vocab_size,
        chunk=training.loss_chunk,
        sharding=sharding,
    )


def _validation(config: ml_collections.ConfigDict, model: MemoryConfig, sharding):
    """A function of the parameters: validation perplexity of the tuned mixture, of the memory alone, and lambda."""
    held_out = open_artifact(epath.Path(config.workdir) / "datastore" / "validation", "datastore")
    sequences = held_out.arrays["next_tokens"].shape[0]
    count = min(config.training.evaluation_sequences or sequences, sequences)
    name = "memory_inputs" if "memory_inputs" in held_out.arrays else "keys"
    inputs_NxD = held_out.read(name, 0, count).reshape(-1, model.input_width)
    next_N = held_out.read("next_tokens", 0, count).reshape(-1)
    base_N = held_out.read("base_log_probabilities", 0, count).reshape(-1)

    dtype = held_out.config.get("compute_dtype", "float32")  # that of the base's scores

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


def make_task(
    config: ml_collections.ConfigDict,
    model: MemoryConfig,
    base_config: language_model.Config,
    sharding,
    *,
    name: str,
    folder: str,
    initialize: Callable[..., dict],
    frozen,
    source,
    validate,
    start: Callable[[], tuple] = tuple,
) -> loop.Task:
    """What `loop.fit` trains: the memory of a config, beside a base LM of given dimensions.

    Args:
      config: the whole config.
      model, base_config: dimensions of the memory and of the base LM.
      frozen: parameters of the base LM where `config.training.mode` is "online", else {}.
      name, folder, initialize, source, validate, start: as of `loop.Task`.

    Raises:
      ConfigError: the mesh does not divide the memory.
    """
    length, training = config.base.context_length, config.training
    abstract = jax.eval_shape(functools.partial(memory.init, model), jax.random.key(0))
    sharding.check_divides(abstract, memory.logical_axes(model))  # its programs name their own collectives
    input_tap = tapped_block(base_config.blocks, config.datastore.input_depth)
    online = training.mode == "online"
    base_flops = flops.language_model_forward(base_config, length, output_projection=False) if online else 0
    return loop.Task(
        name=name,
        folder=folder,
        settings=training,
        initialize=initialize,
        abstract_parameters=abstract,
        logical_axes=memory.logical_axes(model),
        loss=functools.partial(_loss, model, base_config, input_tap, training),
        frozen=frozen,
        source=source,
        validate=validate,
        positions_per_sequence=length,
        flops_per_position=3 * flops.memory_forward(model) + base_flops,
        start=start,
    )


def run(config: ml_collections.ConfigDict) -> Artifact:
    """Trains the memory of `config.workdir`."""
    return train(config, "memory")


def train(config: ml_collections.ConfigDict, folder: str) -> Artifact:
    """Trains a memory into a folder of `config.workdir`.

    Raises:
      UserError: an input is missing or contradicts the config.
    """
    workdir = epath.Path(config.workdir)
    base = open_artifact(workdir / "base", "base")
    datastore = open_artifact(workdir / "datastore" / "train", "datastore")
    targets = open_artifact(workdir / "targets" / "train", "targets")
    tokens = open_artifact(workdir / "tokens", "tokens")
    if targets.inputs["datastore/train"] != datastore.fingerprint:
        raise ConfigError(f"{targets.path}: was made from another datastore than {datastore.path}; run `targets` again")

    base_config = saved.language_model_config(base)
    block = tapped_block(base_config.blocks, config.datastore.input_depth)
    held = datastore.summary.get("input_block", block)  # datastores of earlier versions do not say
    if block != held:
        raise ConfigError(
            f"config.datastore.input_depth: {config.datastore.input_depth} is not that of {datastore.path}, which "
            f"holds the inputs of block {held} of {base_config.blocks}; set it to {held / base_config.blocks:.4g}, or "
            "delete the datastore and run its stage again"
        )

    path = workdir / folder
    settings = {"memory": configs.plain(config.memory), "training": loop.origin(config.training)}
    inputs = {"base": base.fingerprint, "datastore": datastore.fingerprint, "targets": targets.fingerprint}
    start = settings["training"].pop("start")  # what lies there counts, not where it lies
    started = open_artifact(start, "memory") if start else None
    if started:
        inputs["start"] = started.fingerprint
    if finished := find_finished(path, "memory", settings, inputs):
        say(f"{folder}: finished already")
        return finished

    sharding = Sharding.of(config)
    loop.check_batch(config.training, sharding, "training")
    # Offline as online, the memory reads the base LM's states, so its input is as wide as the base.
    model = dimensions(
        config,
        tokens.summary["vocab_size"],
        base_config.width,
        sharding.mesh.shape["tensor"],
        norm_epsilon=base_config.norm_epsilon,
    )
    online = config.training.mode == "online"
    if config.memory.output_from_base and model.width != base_config.width:
        raise ConfigError(
            f"config.memory.output_from_base: needs config.memory.width ({model.width}) equal to the base's width "
            f"({base_config.width})"
        )
    key, start = jax.random.key(config.training.seed), tuple
    initialize = functools.partial(memory.init, model, key)
    if started:
        model = _started(started, model)
        initialize = lambda parameters: parameters  # noqa: E731
        start = lambda: saved.load_memory(started.path, sharding)[:1]  # noqa: E731
    elif config.memory.output_from_base:
        # The base's vocabulary may be padded beyond the tokenizer's.
        initialize = lambda kernel_DxV: memory.init(model, key, kernel_DxV[:, : model.vocab_size])  # noqa: E731
        start = lambda: (language_model.output_kernel(saved.load_language_model(base.path, sharding)[0]),)  # noqa: E731

    source = data.TargetSource(datastore, targets, TokenStream(tokens, "train") if online else None)
    writer = ArtifactWriter.create(path, "memory", settings, inputs, {})
    task = make_task(
        config,
        model,
        base_config,
        sharding,
        name=folder,
        folder=writer.path,
        initialize=initialize,
        frozen=saved.load_language_model(base.path, sharding)[0] if online else {},
        source=source,
        validate=_validation(config, model, sharding),
        start=start,
    )
    parameters, figures = loop.fit(task, sharding)
    figures["input_block"] = block  # where the memory is to be read from, whatever a later config says
    figures["positions"] = int(figures["steps"] * config.training.batch_sequences * config.base.context_length)
    figures["training_flops"] = float(np.float64(figures["positions"]) * task.flops_per_position)
    saved.seal(writer, model, parameters, figures)
    return open_artifact(path, "memory")
