"""The programs that stages run on devices, built with the stages' own functions from a config alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from mlpmem_jax.core.sharding import Sharding, placed_shapes
from mlpmem_jax.interop import published
from mlpmem_jax.models import flops, language_model, scoring
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval import backends, datastore, exact_backend, key_shards, ring
from mlpmem_jax.training import continued, data, loop, memory_task, train_base

STAGES = ("train", "datastore", "neighbors")


@dataclasses.dataclass(frozen=True)
class ModelDimensions:
    """Dimensions of all models of a config.

    Attributes:
      base: the language model that the memory extends.
      keys: the model that makes the keys; often the base.
      memory: the memory.
      separate_inputs: whether memory inputs are stored separately from the keys.
    """

    base: language_model.Config
    keys: language_model.Config
    memory: MemoryConfig
    separate_inputs: bool


@dataclasses.dataclass(frozen=True)
class StageProgram:
    """A jitted function with the arguments to compile it for.

    Attributes:
      name: display name.
      stage: one of `STAGES`.
      function, arguments, static: lowered as function.lower(*arguments, **static).
      flops: model FLOPs of one call, from its dimensions, without recomputation.
      positions: positions of one call.
      calls: number of calls in the whole run.
    """

    name: str
    stage: str
    function: Callable
    arguments: tuple
    static: Mapping[str, Any]
    flops: float
    positions: int
    calls: float


def models_of(config: ml_collections.ConfigDict, tensor_shards: int) -> ModelDimensions:
    """The dimensions of a config's models.

    Raises:
      UserError: the dimensions of an imported base are unknown.
    """
    if config.base.source != "train":
        base = published.dimensions(config.base.path)
    else:
        base = train_base.dimensions(config, config.tokenizer.vocab_size)
    keys = published.dimensions(config.datastore.key_model) if config.datastore.key_model else base
    memory = memory_task.dimensions(config, base.vocab_size, base.width, tensor_shards, base.norm_epsilon)
    input_block = datastore.block_at_depth(base.blocks, config.datastore.input_depth)
    return ModelDimensions(base, keys, memory, bool(config.datastore.key_model) or input_block != keys.blocks)


def base_positions(config: ml_collections.ConfigDict, positions: int) -> int:
    """Positions on which the base is trained or fine-tuned, for a split of `positions` positions.

    Fine-tuning includes the other runs that choose its learning rate.
    """
    settings, length = config.base.training, config.base.context_length
    if config.base.source == "train":
        steps = loop.total_steps(settings, positions // length)
    else:
        steps = continued.steps_with_rate_search(config.base.finetune_steps)
    return steps * settings.batch_sequences * length


def build(config: ml_collections.ConfigDict, stage: str, sharding: Sharding, positions: int) -> list:
    """The programs of a stage, as a list of `StageProgram`; none if it computes on the hosts.

    Args:
      config: the whole config.
      stage: one of `STAGES`.
      sharding: sharding over devices that need not be attached.
      positions: positions of the training split.

    Raises:
      UserError: the config does not fit the mesh.
    """
    models = models_of(config, sharding.mesh.shape["tensor"])
    makers = {"train": _train, "datastore": _datastore, "neighbors": _neighbors}
    return makers[stage](config, models, sharding, positions)


def _train(config, models: ModelDimensions, sharding: Sharding, positions: int) -> list[StageProgram]:
    loop.check_batch(config.training, sharding, "training")
    online = config.training.mode == "online"
    task = memory_task.memory_task(config, models.memory, models.base, sharding)
    frozen = _abstract_parameters(models.base, sharding) if online else {}
    length = config.base.context_length
    steps = loop.total_steps(config.training, positions // length)
    program = loop.step_program(task, sharding, steps)
    batch = batch_of_memory(config, models, config.training.batch_sequences)
    per_step = config.training.batch_sequences * length
    step = StageProgram(
        name="train step",
        stage="train",
        function=program.step,
        arguments=(program.abstract_state, frozen, _sharded(batch, sharding)),
        static={},
        flops=task.flops_per_position * per_step,
        positions=per_step,
        calls=steps,
    )
    chunk = scoring.chunk_positions(models.memory.padded_vocab_size, sharding)
    scored = (((models.base.width,), config.datastore.dtype), ((), "int32"))
    rows = [jax.ShapeDtypeStruct((chunk, *shape), dtype) for shape, dtype in scored]
    validations = steps / config.training.evaluate_every
    validation = StageProgram(
        name="validation",
        stage="train",
        function=scoring.memory_chunk,
        arguments=(program.abstract_state["parameters"], *_sharded(rows, sharding)),
        # As the scores of the base, which they are mixed with.
        static={
            "config": models.memory,
            "compute_dtype": jnp.dtype(config.datastore.compute_dtype),
            "sharding": sharding,
        },
        flops=flops.memory_forward(models.memory) * chunk,
        positions=chunk,
        calls=validations * validated_positions(config, positions) / chunk,
    )
    return [step, validation]


def _datastore(config, models: ModelDimensions, sharding: Sharding, positions: int) -> list[StageProgram]:
    settings, length = config.datastore, config.base.context_length
    input_block = datastore.block_at_depth(models.base.blocks, settings.input_depth)
    rows = settings.batch_sequences * length
    tokens = _sharded([jax.ShapeDtypeStruct((settings.batch_sequences, length), "int32")] * 2, sharding)

    def forward(name, model, input_blocks, held_out: bool, calls: float) -> StageProgram:
        return StageProgram(
            name=name,
            stage="datastore",
            function=datastore.forward,
            arguments=(_abstract_parameters(model, sharding), *tokens),
            static={
                "config": model,
                "input_blocks": input_blocks,
                "dtype": jnp.dtype(settings.dtype),
                "compute_dtype": jnp.dtype(settings.compute_dtype),
                "sharding": sharding,
                "scored": held_out,
            },
            flops=language_model.forward_flops(model, length, output_projection=held_out) * rows,
            positions=rows,
            calls=calls,
        )

    keys = () if settings.key_model else (models.base.blocks,)
    base_blocks = (*keys, input_block) if models.separate_inputs else keys
    held_out = positions * (config.corpus.validation_fraction + config.corpus.test_fraction)
    programs = [
        forward("base", models.base, base_blocks, False, positions / rows),
        forward("base, scored", models.base, base_blocks, True, held_out / rows),
    ]
    if settings.key_model:
        calls = (positions + held_out) / rows
        programs.append(forward("model of the keys", models.keys, (models.keys.blocks,), False, calls))
    return programs


def _neighbors(config, models: ModelDimensions, sharding: Sharding, positions: int) -> list[StageProgram]:
    if backends.planned(config.targets.backend) is not exact_backend.Backend:
        return []  # `host_search` has the hours of ScaNN
    keys = min(positions, config.targets.key_shard_rows)
    queries = ring.QUERIES_PER_DEVICE * sharding.mesh.size
    width = config.targets.search_dimensions or models.keys.width
    candidates = key_shards.candidates(config.targets.k, config.targets.search_dimensions)
    function, arguments = ring.program(
        sharding.mesh, keys, queries, width, candidates, config.datastore.dtype, config.targets.recall_target
    )
    search = StageProgram(
        name="exact search",
        stage="neighbors",
        function=function,
        arguments=arguments,
        static={},
        flops=2.0 * keys * queries * width,
        positions=queries,
        calls=positions / queries * -(-positions // keys),
    )
    return [search]


def batch_of_memory(config: ml_collections.ConfigDict, models: ModelDimensions, sequences: int) -> dict:
    """Shapes and dtypes of a batch on which the memory is trained, with as many entries as there can be."""
    inputs = None if config.training.mode == "online" else (models.base.width, config.datastore.dtype)
    entries = data.padded_entries(most_entries(config, models))
    return data.abstract_batch(sequences, config.base.context_length, entries, models.memory.vocab_size, inputs)


def validated_positions(config: ml_collections.ConfigDict, positions: int) -> float:
    """Positions of the validation split on which the memory is validated, for a training split of `positions`."""
    held_out = positions * config.corpus.validation_fraction
    return min(config.training.evaluation_sequences * config.base.context_length or held_out, held_out)


def most_entries(config: ml_collections.ConfigDict, models: ModelDimensions) -> int:
    """Maximum entries of a target distribution: the number of neighbors, if all their tokens differ."""
    return min(config.targets.keep or config.targets.k, config.targets.k, models.base.vocab_size)


def _abstract_parameters(config: language_model.Config, sharding: Sharding):
    abstract = language_model.abstract_parameters(config)
    return placed_shapes(abstract, sharding.tree(language_model.logical_axes(config), abstract))


def _sharded(tree, sharding: Sharding):
    """The same shapes with the sharding of `Sharding.global_batch`."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding.rows(len(array.shape))), tree
    )
