"""Continuing prompts with a language model, alone or with its memory beside it.

The memory reads the hidden state of the position whose next token is wanted, so a prompt costs it one position, and
p = lambda p_MLP + (1 - lambda) p_LM (section 3 of the paper "MLP Memory", arXiv 2508.01832) is formed in log space.

Dimensions: B sequences, T positions of the prompts, S of the cache, D width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.inference.sampling import GREEDY, Sampling, sample
from mlpmem_jax.models import gpt2, memory, modules
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.memory import MemoryConfig

_PROMPT_MULTIPLE = 32  # prompts are padded to whole multiples, so that few lengths are compiled


@dataclasses.dataclass(frozen=True)
class Models:
    """Dimensions of a base LM and of its memory, if any; the memory reads tap `input_block` of the base."""

    base: GPT2Config
    memory: MemoryConfig | None = None
    input_block: int = 0


class Parameters(NamedTuple):
    """Parameters of both, and the interpolation weight lambda. Without a memory the last two are None."""

    base: dict
    memory: dict | None = None
    weight: float | jax.Array | None = None


class Cache(NamedTuple):
    """Keys and values of all positions so far, for each block [B, H, S, K]; S is the room there is."""

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    length: jax.Array  # positions filled, padding included
    padding_B: jax.Array  # positions in front of each prompt that are no part of it


@jax.jit
def prepare(parameters: Parameters) -> Parameters:
    """Parameters as `prefill` and `step` take them: each block's arrays on their own, read where they lie."""
    base, beside, weight = parameters
    return Parameters(modules.unstack(base), beside and modules.unstack(beside), weight)


def prefill(
    models: Models, parameters: Parameters, tokens_BxT: jax.Array, padding_B: jax.Array, room: int
) -> tuple[jax.Array, Cache]:
    """Reads the prompts: log-probabilities of the first new token, float32 [B, V], and the cache.

    Args:
      models: dimensions (static).
      parameters: from `prepare`.
      tokens_BxT: int32; prompts end at the last position, `padding_B` positions in front of them are ignored.
      room: positions the cache has room for, T and what will be added (static).
    """
    length = tokens_BxT.shape[1]
    positions_T = jnp.arange(length)
    seen_BxTxT = (positions_T[:, None] >= positions_T) & (positions_T >= padding_B[:, None, None])
    # Padding sees itself: a softmax over nothing is no number, and would spread through the values.
    mask_Bx1xTxT = jnp.where(seen_BxTxT | jnp.eye(length, dtype=bool), 0.0, -jnp.inf)[:, None]
    keys, values = [], []

    def attend(query_BxHxTxK, key_BxHxTxK, value_BxHxTxK):
        extra = ((0, 0), (0, 0), (0, room - length), (0, 0))
        keys.append(jnp.pad(key_BxHxTxK, extra))
        values.append(jnp.pad(value_BxHxTxK, extra))
        return gpt2.attention(query_BxHxTxK, key_BxHxTxK, value_BxHxTxK, mask_Bx1xTxT)

    positions_BxT = jnp.maximum(positions_T - padding_B[:, None], 0)
    log_probabilities_BxV = _forward(models, parameters, tokens_BxT, positions_BxT, lambda block: attend)
    return log_probabilities_BxV, Cache(tuple(keys), tuple(values), jnp.int32(length), padding_B)


def step(models: Models, parameters: Parameters, cache: Cache, tokens_B: jax.Array) -> tuple[jax.Array, Cache]:
    """Reads one more token of each sequence: log-probabilities of the next, float32 [B, V], and the cache."""
    positions_S = jnp.arange(cache.keys[0].shape[2])
    seen_BxS = (positions_S < cache.length) & (positions_S >= cache.padding_B[:, None])
    mask_Bx1x1xS = jnp.where(seen_BxS, 0.0, -jnp.inf)[:, None, None]
    keys, values = [], []

    def attend(block, query_BxHx1xK, key_BxHx1xK, value_BxHx1xK):
        keys.append(key_BxHx1xK)
        values.append(value_BxHx1xK)
        return _attention_of_last(
            query_BxHx1xK, key_BxHx1xK, value_BxHx1xK, cache.keys[block], cache.values[block], mask_Bx1x1xS
        )

    positions_Bx1 = (cache.length - cache.padding_B)[:, None]
    log_probabilities_BxV = _forward(
        models, parameters, tokens_B[:, None], positions_Bx1, lambda block: functools.partial(attend, block)
    )

    # No log-probability exceeds 1, so this is the length. As a result of the whole step it tells the compiler that the
    # cache is written after it was read, in place; otherwise it makes copies.
    end = cache.length + (log_probabilities_BxV[0, 0] > 1)

    def extended(arrays, new):
        update = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=end, axis=2)
        return tuple(map(update, arrays, new))

    return log_probabilities_BxV, Cache(
        extended(cache.keys, keys), extended(cache.values, values), cache.length + 1, cache.padding_B
    )


def _attention_of_last(query_BxHx1xK, key_BxHx1xK, value_BxHx1xK, keys_BxHxSxK, values_BxHxSxK, mask_Bx1x1xS):
    """Attention of one position to those of the cache and to itself, [B, H, 1, K].

    Itself apart from the cache: an update of the cache that is read in the same step would copy all of it.
    """
    query_BxHx1xK = query_BxHx1xK * query_BxHx1xK.shape[-1] ** -0.5
    scores_BxHx1xS = jnp.einsum("bhtk,bhsk->bhts", query_BxHx1xK, keys_BxHxSxK) + mask_Bx1x1xS
    own_BxHx1x1 = jnp.sum(query_BxHx1xK * key_BxHx1xK, axis=-1, keepdims=True)
    maximum_BxHx1x1 = jnp.maximum(own_BxHx1x1, scores_BxHx1xS.max(-1, keepdims=True))
    weights_BxHx1xS, own_BxHx1x1 = jnp.exp(scores_BxHx1xS - maximum_BxHx1x1), jnp.exp(own_BxHx1x1 - maximum_BxHx1x1)
    mixed_BxHx1xK = jnp.einsum("bhts,bhsk->bhtk", weights_BxHx1xS, values_BxHxSxK) + own_BxHx1x1 * value_BxHx1xK
    return mixed_BxHx1xK / (weights_BxHx1xS.sum(-1, keepdims=True) + own_BxHx1x1)


def _forward(models, parameters, tokens_BxT, positions_BxT, attention_of_block) -> jax.Array:
    """Log-probabilities after the last position, float32 [B, V]."""
    base, beside, weight = parameters
    x_BxTxD = base["wte"]["embedding"][tokens_BxT] + base["wpe"]["embedding"][positions_BxT]
    build = functools.partial(gpt2.Block, models.base, jnp.float32)
    for index, block in enumerate(base["h"]):
        x_BxTxD, tap_BxTxD = modules.bind(build, block)(x_BxTxD, attention_of_block(index))
        if index + 1 == models.input_block:
            memory_input_BxD = tap_BxTxD[:, -1]
    last_BxD = gpt2.final_norm(base, models.base, x_BxTxD[:, -1])
    base_log_BxV = jax.nn.log_softmax(last_BxD @ gpt2.output_kernel(base))
    if models.memory is None:
        return base_log_BxV
    memory_log_BxV = jax.nn.log_softmax(memory.logits(beside, models.memory, memory_input_BxD))
    return mix(base_log_BxV, memory_log_BxV[:, : models.memory.vocab_size], weight)


def mix(base_log_BxV: jax.Array, memory_log_BxW: jax.Array, weight: jax.Array) -> jax.Array:
    """log(lambda p_MLP + (1 - lambda) p_LM), float32 [B, V]; tokens that the memory does not know have p_MLP = 0."""
    unknown = base_log_BxV.shape[1] - memory_log_BxW.shape[1]
    memory_log_BxV = jnp.pad(memory_log_BxW, ((0, 0), (0, unknown)), constant_values=-jnp.inf)
    return jnp.logaddexp(jnp.log(weight) + memory_log_BxV, jnp.log1p(-weight) + base_log_BxV)


@functools.partial(jax.jit, static_argnames=("models", "room", "sampling"))
def first_tokens(models, parameters, tokens_BxT, padding_B, key, *, room, sampling) -> tuple[jax.Array, Cache]:
    """The first new token of each prompt, int32 [B], and the cache: `prefill` and one draw."""
    log_probabilities_BxV, cache = prefill(models, parameters, tokens_BxT, padding_B, room)
    return sample(log_probabilities_BxV, jax.random.fold_in(key, 0), sampling), cache


@functools.partial(jax.jit, static_argnames=("models", "count", "sampling"))
def following_tokens(models, parameters, cache, tokens_B, key, end_token, *, count, sampling) -> jax.Array:
    """`count` new tokens of each sequence, int32 [B, count], the first of which are `tokens_B`.

    After a sequence's `end_token` come copies of it; the loop stops when all sequences have ended.
    """
    tokens_BxN = jnp.full((tokens_B.shape[0], count), end_token, jnp.int32).at[:, 0].set(tokens_B)

    def unfinished(state):
        index, tokens_B, _, _ = state
        return (index < count) & jnp.any(tokens_B != end_token)

    def advance(state):
        index, tokens_B, tokens_BxN, cache = state
        log_probabilities_BxV, cache = step(models, parameters, cache, tokens_B)
        drawn_B = sample(log_probabilities_BxV, jax.random.fold_in(key, index), sampling)
        tokens_B = jnp.where(tokens_B == end_token, end_token, drawn_B)
        return index + 1, tokens_B, tokens_BxN.at[:, index].set(tokens_B), cache

    return jax.lax.while_loop(unfinished, advance, (1, tokens_B, tokens_BxN, cache))[2]


def generate(
    models: Models,
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    end_token: int = -1,
) -> list[np.ndarray]:
    """New tokens of each prompt, int32, at most `count`, up to and without the first `end_token`.

    Args:
      models: dimensions.
      parameters: from `prepare`.
      prompts: token ids, at least one each.
      sampling: greedy by default.
      seed: of the draws.
      end_token: id of the end of text; -1 = none.

    Raises:
      UserError: an empty prompt, no tokens asked for, or more than the base's context length holds.
    """
    lengths_B = np.array([len(prompt) for prompt in prompts])
    if not len(prompts) or lengths_B.min() < 1 or count < 1:
        raise UserError("generation needs at least one prompt, a token in each prompt, and a token to add")
    if lengths_B.max() + count > models.base.context_length:
        raise UserError(
            f"a prompt of {lengths_B.max()} tokens and {count} new ones exceed the context of "
            f"{models.base.context_length} tokens; shorten the prompt or ask for fewer"
        )
    length = -(-lengths_B.max() // _PROMPT_MULTIPLE) * _PROMPT_MULTIPLE
    tokens_BxT = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(tokens_BxT, prompts, strict=True):
        row[length - len(prompt) :] = prompt
    padding_B = jnp.asarray(length - lengths_B, jnp.int32)
    key = jax.random.key(seed)
    tokens_B, cache = first_tokens(
        models, parameters, tokens_BxT, padding_B, key, room=length + count, sampling=sampling
    )
    tokens_BxN = following_tokens(
        models, parameters, cache, tokens_B, key, end_token, count=count, sampling=sampling
    )
    return [row[: np.argmax(row == end_token)] if end_token in row else row for row in np.asarray(tokens_BxN)]
