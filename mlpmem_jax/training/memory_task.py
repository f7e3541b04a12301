"""The training task of a memory: its dimensions, its loss, and what `loop` needs."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_collections

from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import flops, language_model, memory, parallel_memory
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval.datastore import block_at_depth
from mlpmem_jax.training import loop
from mlpmem_jax.training.loss import sparse_cross_entropy

_TILE = 128  # columns of a matrix unit


def vocabulary_multiple(tensor_shards: int) -> int:
    """The padded vocabulary is a multiple of this: of whole tiles, and divisible by the mesh."""
    return math.lcm(_TILE, tensor_shards)


def dimensions(
    config: ml_collections.ConfigDict,
    vocab_size: int,
    input_width: int,
    tensor_shards: int,
    norm_epsilon: float = 1e-5,
) -> MemoryConfig:
    """The memory's dimensions; the vocabulary is padded so that the mesh divides it, `norm_epsilon` is the base's.

    All `tensor` sizes that are powers of two up to 128 give the same dimensions, so a run may resume on another mesh.
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


@dataclasses.dataclass(frozen=True)
class MemoryLoss:
    """The loss of a memory on a batch, from stored inputs or with the base LM run in the step.

    Attributes:
      model: dimensions of the memory.
      settings: the group config.training.
      base: dimensions of the base LM; only for online training.
      input_block: the block of the base LM whose input the memory reads; only for online training.
    """

    model: MemoryConfig
    settings: ml_collections.ConfigDict
    base: language_model.Config | None = None
    input_block: int = 0

    def __call__(self, sharding: Sharding, parameters: dict, frozen: dict, batch: dict):
        """(loss, {name: statistic}), as in `loop.TrainingTask`; online, `frozen` has the base LM's parameters."""
        settings, dtype = self.settings, jnp.dtype(self.settings.compute_dtype)
        inputs_NxD = self._inputs(frozen, batch).reshape(-1, self.model.input_width).astype(dtype)
        hidden_NxD = parallel_memory.hidden(
            parameters, self.model, inputs_NxD, sharding=sharding, compute_dtype=dtype, remat=settings.remat
        )
        entries = batch["token_ids"].shape[-1]
        return sparse_cross_entropy(
            hidden_NxD.astype(dtype),
            memory.output_kernel(parameters),
            batch["token_ids"].reshape(-1, entries),
            batch["probabilities"].reshape(-1, entries),
            batch["next_tokens"].reshape(-1),
            alpha=settings.alpha,
            vocab_size=self.model.vocab_size,
            chunk=settings.loss_chunk,
            sharding=sharding,
        )

    def _inputs(self, frozen: dict, batch: dict) -> jax.Array:
        if self.settings.mode != "online":
            return batch["memory_inputs"]
        block, dtype = self.input_block, jnp.dtype(self.settings.compute_dtype)
        parameters = jax.lax.stop_gradient(frozen)
        _, inputs = language_model.features(
            parameters, self.base, batch["tokens"], input_blocks=(block,), compute_dtype=dtype
        )
        return inputs[block]


def memory_task(
    config: ml_collections.ConfigDict,
    model: MemoryConfig,
    base: language_model.Config,
    sharding: Sharding,
    initialize: Callable[..., dict] | None = None,
) -> loop.TrainingTask:
    """The training task of a config's memory, for a base LM of given dimensions.

    Args:
      config: the whole config.
      model, base: dimensions of the memory and of the base LM.
      sharding: the run's sharding.
      initialize: as in `loop.TrainingTask`; by default every parameter is random.

    Raises:
      ConfigError: the mesh does not divide the memory.
    """
    settings, length = config.training, config.base.context_length
    abstract = memory.abstract_parameters(model)
    sharding.check_divides(abstract, memory.logical_axes(model))  # the memory's programs use explicit collectives
    is_online = settings.mode == "online"
    base_flops = language_model.forward_flops(base, length, output_projection=False) if is_online else 0
    return loop.TrainingTask(
        settings=settings,
        initialize=initialize or functools.partial(memory.init, model, jax.random.key(settings.seed)),
        abstract_parameters=abstract,
        logical_axes=memory.logical_axes(model),
        loss=MemoryLoss(model, settings, base, block_at_depth(base.blocks, config.datastore.input_depth)),
        positions_per_sequence=length,
        flops_per_position=3 * flops.memory_forward(model) + base_flops,
    )
