"""A language model with a KV cache, and its memory: one prefill pass over the prompts, then one token at a time.

The memory reads only the hidden state of the position whose next token is wanted, so it runs on one position per
prompt, and not at all in steps that do not need it.

Dimensions: B sequences, T prompt positions, A cache positions, D width, H query heads, G key/value heads, W head width,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.models import language_model, memory, modules, transformer
from mlpmem_jax.models.memory import MemoryConfig


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Dimensions of a base LM and, optionally, of its memory, which reads the input of block `input_block`."""

    base: language_model.Config
    memory: MemoryConfig | None = None
    input_block: int = 0


class Parameters(NamedTuple):
    """Parameters of base and memory, and the interpolation weight lambda. Without a memory the last two are None."""

    base: dict
    memory: dict | None = None
    weight: float | jax.Array | None = None


class Cache(NamedTuple):
    """Keys and values of all positions so far, [B, G, A, W] per block; A is the capacity."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array  # filled positions, including padding
    padding_B: jax.Array  # padding positions in front of each prompt


class Reading(NamedTuple):
    """The base LM's output at the last position: log p_LM, float32 [B, V], and the memory's input [B, D]."""

    base_log_BxV: jax.Array
    memory_input_BxD: jax.Array | None


def weights_dtype(compute_dtype: str) -> str:
    """The dtype to generate in on the present devices, where the models were scored in `compute_dtype`.

    On CPUs, XLA multiplies a bfloat16 matrix by one row ten times as slowly as a float32 one.
    """
    return "float32" if jax.default_backend() == "cpu" else compute_dtype


@functools.partial(jax.jit, static_argnames="dtype")
def prepare(parameters: Parameters, dtype: str = "float32") -> Parameters:
    """Prepares parameters for `prefill` and `step`: unstacks each block's arrays, so that steps read them in place.

    Matrices and embeddings are stored in `dtype`, which is then that of the cache and of matrix products; softmax,
    norms and the residual stream are float32. In bfloat16 a step reads half the bytes.
    """

    def stored(path, array):
        return array.astype(dtype) if path[-1].key in ("kernel", "embedding") else array

    base, memory = (
        models and jax.tree_util.tree_map_with_path(stored, modules.unstack(models)) for models in parameters[:2]
    )
    return Parameters(base, memory, parameters.weight)


def left_padded(prompts: Sequence[Sequence[int]], multiple: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as a batch for `prefill`: (tokens int32 [B, T], padding int32 [B]).

    T is a multiple of `multiple`, so that few lengths are compiled.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens_BxT = np.zeros((len(prompts), -(-lengths_B.max() // multiple) * multiple), np.int32)
    for row, prompt in zip(tokens_BxT, prompts, strict=True):
        row[len(row) - len(prompt) :] = prompt
    return tokens_BxT, tokens_BxT.shape[1] - lengths_B


def prefill(
    models: DecoderConfig, parameters: Parameters, tokens_BxT: jax.Array, padding_B: jax.Array, room: int
) -> tuple[Reading, Cache]:
    """Reads the prompts.

    Args:
      models: the models' dimensions (static).
      parameters: from `prepare`.
      tokens_BxT: int32; prompts end at the last position, and the `padding_B` positions in front of them are ignored.
      room: capacity of the cache in positions: T plus the tokens to be added (static).
    """
    length = tokens_BxT.shape[1]
    positions_T = jnp.arange(length)
    seen_TxT = transformer.causal_mask(length, language_model.window(models.base)) == 0
    seen_BxTxT = seen_TxT & (positions_T >= padding_B[:, None, None])
    # Padding attends to itself: a softmax over nothing is NaN, which would spread through the values.
    mask_Bx1xTxT = jnp.where(seen_BxTxT | jnp.eye(length, dtype=bool), 0.0, -jnp.inf)[:, None]
    positions_BxT = jnp.maximum(positions_T - padding_B[:, None], 0)
    rotate = language_model.rotation(models.base, positions_BxT)
    keys, values = [], []

    def attend(query_BxHxTxW, key_BxGxTxW, value_BxGxTxW):
        query_BxHxTxW, key_BxGxTxW = rotate(query_BxHxTxW), rotate(key_BxGxTxW)
        extra = ((0, 0), (0, 0), (0, room - length), (0, 0))
        keys.append(jnp.pad(key_BxGxTxW, extra))
        values.append(jnp.pad(value_BxGxTxW, extra))
        return transformer.attention(query_BxHxTxW, key_BxGxTxW, value_BxGxTxW, mask_Bx1xTxT)

    reading = _read(models, parameters.base, tokens_BxT, positions_BxT, lambda block: attend)
    return reading, Cache(tuple(keys), tuple(values), jnp.int32(length), padding_B)


def step(models: DecoderConfig, parameters: Parameters, cache: Cache, tokens_B: jax.Array) -> tuple[Reading, Cache]:
    """Reads one more token of each sequence, int32 [B]."""
    positions_A = jnp.arange(cache.keys[0].shape[2])
    seen_BxA = (positions_A < cache.length) & (positions_A >= cache.padding_B[:, None])
    if window := language_model.window(models.base):
        seen_BxA &= positions_A > cache.length - window
    mask_Bx1x1xA = jnp.where(seen_BxA, 0.0, -jnp.inf)[:, None, None]
    positions_Bx1 = (cache.length - cache.padding_B)[:, None]
    rotate = language_model.rotation(models.base, positions_Bx1)
    keys, values = [], []

    def attend(block, query_BxHx1xW, key_BxGx1xW, value_BxGx1xW):
        query_BxHx1xW, key_BxGx1xW = rotate(query_BxHx1xW), rotate(key_BxGx1xW)
        keys.append(key_BxGx1xW)
        values.append(value_BxGx1xW)
        return transformer.attention_of_last(
            query_BxHx1xW, key_BxGx1xW, value_BxGx1xW, cache.keys[block], cache.values[block], mask_Bx1x1xA
        )

    reading = _read(
        models, parameters.base, tokens_B[:, None], positions_Bx1, lambda block: functools.partial(attend, block)
    )
    # No log-probability exceeds 1, so this equals the length. Making it depend on the step's result lets the compiler
    # update the cache in place after reading it; otherwise it copies.
    end = cache.length + (reading.base_log_BxV[0, 0] > 1)
    extend = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=end, axis=2)
    longer = (tuple(map(extend, arrays, new)) for arrays, new in ((cache.keys, keys), (cache.values, values)))
    return reading, Cache(*longer, cache.length + 1, cache.padding_B)


def memory_log_probabilities(models: DecoderConfig, parameters: Parameters, reading: Reading) -> jax.Array:
    """log p_MLP, float32 [B, V]; minus infinity for tokens that are not in the memory's vocabulary."""
    return memory.log_probabilities(parameters.memory, models.memory, reading.memory_input_BxD, models.base.vocab_size)


def mix(base_log_BxV: jax.Array, memory_log_BxV: jax.Array, weight: float | jax.Array) -> jax.Array:
    """log(lambda p_MLP + (1 - lambda) p_LM) (section 3 of the paper "MLP Memory", arXiv 2508.01832), [B, V]."""
    return jnp.logaddexp(jnp.log(weight) + memory_log_BxV, jnp.log1p(-weight) + base_log_BxV)


def can_change_the_likeliest(base_log_BxV: jax.Array, weight: float | jax.Array) -> jax.Array:
    """Whether any p_MLP could change the argmax of the mixture from the base's argmax, bool [B].

    In the extreme case, p_MLP gives all of its lambda to the base's second most probable token.
    """
    likeliest_Bx1 = jnp.argmax(base_log_BxV, axis=-1, keepdims=True)
    is_other_BxV = jnp.arange(base_log_BxV.shape[-1]) != likeliest_Bx1
    second_B = jnp.exp(jnp.max(base_log_BxV, axis=-1, where=is_other_BxV, initial=-jnp.inf))
    return (1 - weight) * (jnp.exp(base_log_BxV.max(-1)) - second_B) <= weight


def _read(
    models: DecoderConfig, base: dict, tokens_BxT: jax.Array, positions_BxT: jax.Array, attention_of: Callable
) -> Reading:
    """Runs the base LM over new positions; `attention_of(block)` returns a block's attention."""
    x_BxTxD = language_model.embed(base, models.base, tokens_BxT, positions_BxT)
    memory_input_BxD = None
    build = functools.partial(language_model.build_block, models.base, language_model.output_kernel(base).dtype)
    for index, block in enumerate(base["h"]):
        x_BxTxD, input_BxTxD = modules.bind(build, block)(x_BxTxD, attention_of(index))
        if index + 1 == models.input_block:
            memory_input_BxD = input_BxTxD[:, -1]
    last_BxD = language_model.final_norm(base, models.base, x_BxTxD[:, -1])
    logits_BxV = language_model.vocabulary_logits(base, models.base, last_BxD)
    return Reading(jax.nn.log_softmax(logits_BxV), memory_input_BxD)
