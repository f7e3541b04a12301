"""Speculative greedy generation: the base drafts several tokens, and one pass of the memory verifies them.

The time of a step is mostly spent reading weights. So the base continues alone with its own argmax tokens and stores
the memory's input at each position. One pass of the memory over these positions then shows how far the mixture agrees;
the first token that differs is replaced, and later drafts are dropped. The result is the same as if the memory ran in
every step.

Where no p_MLP can change the argmax, a draft needs no verification. Wrong drafts waste steps of the base, so each time
one more token is drafted than was right the last time.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlpmem_jax.inference.decoding import (
    Cache,
    DecoderConfig,
    Parameters,
    Reading,
    can_change_the_likeliest,
    memory_log_probabilities,
    mix,
    step,
)

MOST_DRAFTS = 8


def most_drafts() -> int:
    """The number of drafts per verification that pays off on the present devices.

    On CPUs, XLA multiplies a matrix by a few rows no faster than row by row, so there the memory runs in every step.
    """
    return 1 if jax.default_backend() == "cpu" else MOST_DRAFTS


class Drafted(NamedTuple):
    """New tokens, int32 [B, N], and how often each model ran for all tokens after the first."""

    tokens_BxN: jax.Array
    base_steps: jax.Array
    memory_passes: jax.Array


class _State(NamedTuple):
    """The state of the loop; at most W drafts wait for verification.

    Attributes:
      tokens_BxN: new tokens: `known` final ones, then `waiting` drafts.
      window: how many drafts may wait before they are verified.
      base_log_WxBxV, memory_input_WxBxD: the base's outputs at the drafts' positions.
      is_open_WxB: whether the memory could change a draft.
    """

    tokens_BxN: jax.Array
    known: jax.Array
    waiting: jax.Array
    window: jax.Array
    base_log_WxBxV: jax.Array
    memory_input_WxBxD: jax.Array
    is_open_WxB: jax.Array
    cache: Cache
    base_steps: jax.Array
    memory_passes: jax.Array


@functools.partial(jax.jit, static_argnames=("models", "count", "most"))
def greedy_tokens(
    models: DecoderConfig,
    parameters: Parameters,
    cache: Cache,
    tokens_B: jax.Array,
    end_token: jax.Array,
    *,
    count: int,
    most: int,
) -> Drafted:
    """`count` tokens of each sequence, the first of which are `tokens_B`; see `generate.following_tokens`.

    Sequences of a batch advance together: only drafts that are right in every sequence are accepted.

    Args:
      models: dimensions, including a memory.
      most: maximum drafts per pass of the memory; 1 = the memory runs in every step whose token it could change.
    """
    batch, vocabulary = tokens_B.shape[0], models.base.vocab_size
    first = jnp.full((batch, count + most), end_token, jnp.int32).at[:, 0].set(tokens_B)
    zero = jnp.int32(0)
    state = _State(
        first,
        known=jnp.int32(1),
        waiting=zero,
        window=jnp.int32(1),
        base_log_WxBxV=jnp.zeros((most, batch, vocabulary)),
        memory_input_WxBxD=jnp.zeros((most, batch, models.memory.input_width)),
        is_open_WxB=jnp.zeros((most, batch), bool),
        cache=cache,
        base_steps=zero,
        memory_passes=zero,
    )

    def unfinished(state: _State):
        return (state.known < count) & jnp.any(state.tokens_BxN[:, state.known - 1] != end_token)

    final = jax.lax.while_loop(
        unfinished, functools.partial(_advance, models, parameters, end_token, count, most), state
    )
    # Everything after the last known token is already end_token, or a draft past the end of every sequence.
    tokens_BxN = jnp.where(jnp.arange(count + most) < final.known, final.tokens_BxN, end_token)[:, :count]
    return Drafted(tokens_BxN, final.base_steps, final.memory_passes)


def _advance(models: DecoderConfig, parameters: Parameters, end_token, count: int, most: int, state: _State) -> _State:
    """One step of the base, plus verification of waiting drafts if it is due."""
    place, slot = state.known + state.waiting, state.waiting
    last_B = state.tokens_BxN[:, place - 1]
    reading, cache = step(models, parameters, state.cache, last_B)
    has_ended_B = last_B == end_token
    draft_B = jnp.where(has_ended_B, end_token, jnp.argmax(reading.base_log_BxV, axis=-1).astype(jnp.int32))
    is_open_B = can_change_the_likeliest(reading.base_log_BxV, parameters.weight) & ~has_ended_B
    state = state._replace(
        tokens_BxN=state.tokens_BxN.at[:, place].set(draft_B),
        waiting=slot + 1,
        base_log_WxBxV=state.base_log_WxBxV.at[slot].set(reading.base_log_BxV),
        memory_input_WxBxD=state.memory_input_WxBxD.at[slot].set(reading.memory_input_BxD),
        is_open_WxB=state.is_open_WxB.at[slot].set(is_open_B),
        cache=cache,
        base_steps=state.base_steps + 1,
    )
    is_waiting_W = jnp.arange(most) <= slot
    is_open_W = state.is_open_WxB.any(axis=1) & is_waiting_W
    is_due = (
        (is_open_W.sum() >= state.window)
        | (state.waiting == most)
        | (place + 1 >= count)
        | jnp.all(draft_B == end_token)
    )

    def settle():
        """Accepts drafts that cannot be changed, or leaves them waiting."""
        right = jnp.where(is_open_W.any(), 0, state.waiting)
        return state.tokens_BxN, state.known + right, state.waiting - right, state.window, jnp.int32(0)

    def check():
        drafts_BxW = jax.lax.dynamic_slice(state.tokens_BxN, (0, state.known), (len(last_B), most))
        before_BxW = jax.lax.dynamic_slice(state.tokens_BxN, (0, state.known - 1), (len(last_B), most))
        likeliest_WxB = _likeliest(models, parameters, state, most)
        right_BxW = jnp.where(before_BxW == end_token, end_token, likeliest_WxB.T)
        agrees_W = jnp.all(right_BxW == drafts_BxW, axis=0) & is_waiting_W
        agreed = jnp.cumprod(agrees_W).sum()
        corrected_BxW = jnp.where(jnp.arange(most) == agreed, right_BxW, drafts_BxW)
        tokens_BxN = jax.lax.dynamic_update_slice(state.tokens_BxN, corrected_BxW, (0, state.known))
        known = state.known + jnp.minimum(agreed + 1, state.waiting)
        window = jnp.minimum(1 + (is_open_W & (jnp.arange(most) < agreed)).sum(), most)
        return tokens_BxN, known, jnp.int32(0), window.astype(jnp.int32), jnp.int32(1)

    tokens_BxN, known, waiting, window, passes = jax.lax.cond(is_due & is_open_W.any(), check, settle)
    # The cache has every token but the last: rejected drafts will be overwritten.
    forgotten = (state.known + state.waiting) - (known + waiting)
    return state._replace(
        tokens_BxN=tokens_BxN,
        known=known,
        waiting=waiting,
        window=window,
        cache=cache._replace(length=cache.length - forgotten),
        memory_passes=state.memory_passes + passes,
    )


def _likeliest(models: DecoderConfig, parameters: Parameters, state: _State, most: int) -> jax.Array:
    """The argmax of the mixture at every waiting position, int32 [W, B]."""
    base_log_RxV = state.base_log_WxBxV.reshape(-1, models.base.vocab_size)
    reading = Reading(base_log_RxV, state.memory_input_WxBxD.reshape(-1, models.memory.input_width))
    mixed_RxV = mix(base_log_RxV, memory_log_probabilities(models, parameters, reading), parameters.weight)
    return jnp.argmax(mixed_RxV, axis=-1).astype(jnp.int32).reshape(most, -1)
