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
from mlpmem_jax.models import flops, language_model

MOST_DRAFTS = 8


def most_drafts(models: DecoderConfig) -> int:
    """The number of drafts per verification that pays off for these models on the present devices.

    Drafts save passes of the memory, and cost steps of the base where they are wrong, so they pay off only if the
    memory is at least as large as its base. On CPUs, XLA multiplies a matrix by a few rows no faster than row by row.
    In both other cases the memory runs in every step that it could change.
    """
    is_large = flops.memory_parameters(models.memory) >= language_model.parameter_count(models.base)
    return MOST_DRAFTS if is_large and jax.default_backend() != "cpu" else 1


class Drafted(NamedTuple):
    """New tokens, int32 [B, T], and how often each model ran for all tokens after the first."""

    tokens_BxT: jax.Array
    base_steps: jax.Array
    memory_passes: jax.Array


class _State(NamedTuple):
    """The state of the loop; at most C drafts wait for verification.

    Attributes:
      tokens_BxT: new tokens: `known` final ones, then `waiting` drafts.
      window: how many drafts may wait before they are verified.
      base_log_CxBxV, memory_input_CxBxD: the base's outputs at the drafts' positions.
      is_open_CxB: whether the memory could change a draft.
    """

    tokens_BxT: jax.Array
    known: jax.Array
    waiting: jax.Array
    window: jax.Array
    base_log_CxBxV: jax.Array
    memory_input_CxBxD: jax.Array
    is_open_CxB: jax.Array
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
        base_log_CxBxV=jnp.zeros((most, batch, vocabulary)),
        memory_input_CxBxD=jnp.zeros((most, batch, models.memory.input_width)),
        is_open_CxB=jnp.zeros((most, batch), bool),
        cache=cache,
        base_steps=zero,
        memory_passes=zero,
    )

    def unfinished(state: _State):
        return (state.known < count) & jnp.any(state.tokens_BxT[:, state.known - 1] != end_token)

    final = jax.lax.while_loop(
        unfinished, functools.partial(_advance, models, parameters, end_token, count, most), state
    )
    # Everything after the last known token is already end_token, or a draft past the end of every sequence.
    tokens_BxT = jnp.where(jnp.arange(count + most) < final.known, final.tokens_BxT, end_token)[:, :count]
    return Drafted(tokens_BxT, final.base_steps, final.memory_passes)


def _advance(models: DecoderConfig, parameters: Parameters, end_token, count: int, most: int, state: _State) -> _State:
    """One step of the base, plus verification of waiting drafts if it is due."""
    place, slot = state.known + state.waiting, state.waiting
    last_B = state.tokens_BxT[:, place - 1]
    reading, cache = step(models, parameters, state.cache, last_B)
    has_ended_B = last_B == end_token
    draft_B = jnp.where(has_ended_B, end_token, jnp.argmax(reading.base_log_BxV, axis=-1).astype(jnp.int32))
    is_open_B = can_change_the_likeliest(reading.base_log_BxV, parameters.weight) & ~has_ended_B
    state = state._replace(
        tokens_BxT=state.tokens_BxT.at[:, place].set(draft_B),
        waiting=slot + 1,
        base_log_CxBxV=state.base_log_CxBxV.at[slot].set(reading.base_log_BxV),
        memory_input_CxBxD=state.memory_input_CxBxD.at[slot].set(reading.memory_input_BxD),
        is_open_CxB=state.is_open_CxB.at[slot].set(is_open_B),
        cache=cache,
        base_steps=state.base_steps + 1,
    )
    is_waiting_C = jnp.arange(most) <= slot
    is_open_C = state.is_open_CxB.any(axis=1) & is_waiting_C
    is_due = (
        (is_open_C.sum() >= state.window)
        | (state.waiting == most)
        | (place + 1 >= count)
        | jnp.all(draft_B == end_token)
    )

    def settle():
        """Accepts drafts that cannot be changed, or leaves them waiting."""
        right = jnp.where(is_open_C.any(), 0, state.waiting)
        return state.tokens_BxT, state.known + right, state.waiting - right, state.window, jnp.int32(0)

    def check():
        drafts_BxC = jax.lax.dynamic_slice(state.tokens_BxT, (0, state.known), (len(last_B), most))
        before_BxC = jax.lax.dynamic_slice(state.tokens_BxT, (0, state.known - 1), (len(last_B), most))
        likeliest_CxB = _likeliest(models, parameters, state, most)
        right_BxC = jnp.where(before_BxC == end_token, end_token, likeliest_CxB.T)
        agrees_C = jnp.all(right_BxC == drafts_BxC, axis=0) & is_waiting_C
        agreed = jnp.cumprod(agrees_C).sum()
        corrected_BxC = jnp.where(jnp.arange(most) == agreed, right_BxC, drafts_BxC)
        tokens_BxT = jax.lax.dynamic_update_slice(state.tokens_BxT, corrected_BxC, (0, state.known))
        known = state.known + jnp.minimum(agreed + 1, state.waiting)
        window = jnp.minimum(1 + (is_open_C & (jnp.arange(most) < agreed)).sum(), most)
        return tokens_BxT, known, jnp.int32(0), window.astype(jnp.int32), jnp.int32(1)

    tokens_BxT, known, waiting, window, passes = jax.lax.cond(is_due & is_open_C.any(), check, settle)
    # The cache has every token but the last: rejected drafts will be overwritten.
    forgotten = (state.known + state.waiting) - (known + waiting)
    return state._replace(
        tokens_BxT=tokens_BxT,
        known=known,
        waiting=waiting,
        window=window,
        cache=cache._replace(length=cache.length - forgotten),
        memory_passes=state.memory_passes + passes,
    )


def _likeliest(models: DecoderConfig, parameters: Parameters, state: _State, most: int) -> jax.Array:
    """The argmax of the mixture at every waiting position, int32 [C, B]."""
    base_log_NxV = state.base_log_CxBxV.reshape(-1, models.base.vocab_size)
    reading = Reading(base_log_NxV, state.memory_input_CxBxD.reshape(-1, models.memory.input_width))
    mixed_NxV = mix(base_log_NxV, memory_log_probabilities(models, parameters, reading), parameters.weight)
    return jnp.argmax(mixed_NxV, axis=-1).astype(jnp.int32).reshape(most, -1)
