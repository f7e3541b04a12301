"""Continues prompts with a language model, alone or with its memory.

New tokens follow p = lambda p_MLP + (1 - lambda) p_LM, but the memory runs only in steps whose token depends on it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.inference import drafting
from mlpmem_jax.inference.decoding import (
    Cache,
    DecoderConfig,
    Parameters,
    Reading,
    can_change_the_likeliest,
    left_padded,
    memory_log_probabilities,
    mix,
    prefill,
    step,
)
from mlpmem_jax.inference.sampling import GREEDY, Sampling, sample

_PROMPT_MULTIPLE = 32


def generate(
    models: DecoderConfig,
    parameters: Parameters,
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    sampling: Sampling = GREEDY,
    seed: int = 0,
    end_token: int = -1,
) -> list[np.ndarray]:
    """New tokens of each prompt, int32, at most `count`, up to but not including the first `end_token`.

    Args:
      models: the models' dimensions.
      parameters: from `decoding.prepare`.
      prompts: token ids, at least one each.
      sampling: greedy by default.
      seed: random seed for sampling.
      end_token: id of the end of text; -1 = none.

    Raises:
      UserError: a prompt is empty, `count` is 0, or the text would exceed the base's context length.
    """
    if not len(prompts) or not all(map(len, prompts)) or count < 1:
        raise UserError("generation needs at least one prompt, one token in each, and one token to add")
    if (longest := max(map(len, prompts))) + count > models.base.context_length:
        raise UserError(
            f"a prompt of {longest} tokens and {count} new ones exceed the context of "
            f"{models.base.context_length} tokens; shorten the prompt or ask for fewer"
        )
    tokens_BxT, padding_B = left_padded(prompts, _PROMPT_MULTIPLE)
    key, room = jax.random.key(seed), tokens_BxT.shape[1] + count
    tokens_B, cache = first_tokens(models, parameters, tokens_BxT, padding_B, key, room=room, sampling=sampling)
    new_BxT = following_tokens(models, parameters, cache, tokens_B, key, end_token, count=count, sampling=sampling)
    return [row[: np.argmax(row == end_token)] if end_token in row else row for row in np.asarray(new_BxT)]


@functools.partial(jax.jit, static_argnames=("models", "room", "sampling"))
def first_tokens(models, parameters, tokens_BxT, padding_B, key, *, room, sampling) -> tuple[jax.Array, Cache]:
    """The first new token of each prompt, int32 [B], and the cache; arguments as in `decoding.prefill`."""
    reading, cache = prefill(models, parameters, tokens_BxT, padding_B, room)
    return draw(models, parameters, reading, jax.random.fold_in(key, 0), sampling), cache


@functools.partial(jax.jit, static_argnames=("models", "count", "sampling"))
def following_tokens(models, parameters, cache, tokens_B, key, end_token, *, count, sampling) -> jax.Array:
    """`count` new tokens of each sequence, int32 [B, count], the first of which are `tokens_B`.

    After a sequence's `end_token` come copies of it; the loop stops when all sequences have ended.
    """
    if models.memory is not None and sampling == GREEDY:
        most = drafting.most_drafts(models)
        return drafting.greedy_tokens(models, parameters, cache, tokens_B, end_token, count=count, most=most).tokens_BxT
    tokens_BxT = jnp.full((tokens_B.shape[0], count), end_token, jnp.int32).at[:, 0].set(tokens_B)

    def unfinished(state):
        index, tokens_B, _, _ = state
        return (index < count) & jnp.any(tokens_B != end_token)

    def advance(state):
        index, tokens_B, tokens_BxT, cache = state
        reading, cache = step(models, parameters, cache, tokens_B)
        drawn_B = draw(models, parameters, reading, jax.random.fold_in(key, index), sampling)
        tokens_B = jnp.where(tokens_B == end_token, end_token, drawn_B)
        return index + 1, tokens_B, tokens_BxT.at[:, index].set(tokens_B), cache

    return jax.lax.while_loop(unfinished, advance, (1, tokens_B, tokens_BxT, cache))[2]


def draw(
    models: DecoderConfig, parameters: Parameters, reading: Reading, key: jax.Array, sampling: Sampling
) -> jax.Array:
    """The next token of each sequence, int32 [B].

    The memory runs only if a token depends on it. For greedy decoding, that is where it could change the argmax.
    Sampling from a mixture draws one of its two distributions first, then a token from that one.
    """
    base_log_BxV, weight = reading.base_log_BxV, parameters.weight
    if models.memory is None:
        return sample(base_log_BxV, key, sampling)
    memory_log = functools.partial(memory_log_probabilities, models, parameters, reading)
    if sampling == GREEDY:
        log_BxV = jax.lax.cond(
            jnp.any(can_change_the_likeliest(base_log_BxV, weight)),
            lambda: mix(base_log_BxV, memory_log(), weight),
            lambda: base_log_BxV,
        )
    elif sampling == Sampling(temperature=1.0):
        key, component_key = jax.random.split(key)
        from_memory_Bx1 = jax.random.bernoulli(component_key, weight, (base_log_BxV.shape[0], 1))
        log_BxV = jax.lax.cond(
            jnp.any(from_memory_Bx1),
            lambda: jnp.where(from_memory_Bx1, memory_log(), base_log_BxV),
            lambda: base_log_BxV,
        )
    else:
        log_BxV = mix(base_log_BxV, memory_log(), weight)
    return sample(log_BxV, key, sampling)
