"""Forward passes over several texts packed into one sequence, computing what they have in common only once.

A sequence contains documents one after another. A document is a stem and branches that continue it; a branch attends
to the stem and itself. All documents may share a prefix, whose keys and values are computed once.

Dimensions: B sequences, T positions, A positions that are attended to, L blocks, D width, H heads of queries, G heads
of keys and values, W width of a head.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlpmem_jax.models import language_model, modules, transformer

_CHUNK = 128  # queries per attention chunk, so that scores fit a cache and later keys are skipped


class Layout(NamedTuple):
    """Packed sequences, int32 [B, T] each.

    Attributes:
      tokens: token ids.
      positions: position of each token in its own text, including the prefix.
      documents: the number of each token's document.
      branches: the number of each token's branch within the sequence, from 1; 0 in a stem.
    """

    tokens: jax.Array
    positions: jax.Array
    documents: jax.Array
    branches: jax.Array


class Prefix(NamedTuple):
    """Keys (after rotary embedding) and values of a shared prefix in every block, [L, G, A, W] each."""

    keys: jax.Array
    values: jax.Array


def read_prefix(parameters: dict, config: language_model.Config, tokens_A: jax.Array) -> Prefix:
    """Computes the keys and values of a prefix, tokens int32 [A], for texts that begin with it."""
    positions_1xA = jnp.arange(len(tokens_A), dtype=jnp.int32)[None]
    same_1xA = jnp.zeros_like(positions_1xA)
    layout = Layout(tokens_A[None], positions_1xA, same_1xA, same_1xA)
    _, _, kept = _run(parameters, config, layout, None, (), True)
    return Prefix(*(array_Lx1xGxAxW[:, 0] for array_Lx1xGxAxW in kept))


def features(
    parameters: dict,
    config: language_model.Config,
    layout: Layout,
    prefix: Prefix | None = None,
    input_blocks: tuple[int, ...] = (),
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Hidden states after the final norm, and inputs of feed-forward layers, float32 [B, T, D] each.

    Args:
      parameters: the model's parameters, with stacked blocks.
      config: the model's dimensions.
      layout: tokens and their documents and branches.
      prefix: the prefix of every document, from `read_prefix`.
      input_blocks: blocks, counted from 1, whose inputs are wanted.
    """
    final_BxTxD, block_inputs, _ = _run(parameters, config, layout, prefix, input_blocks, False)
    return final_BxTxD, block_inputs


def _run(parameters, config, layout, prefix, input_blocks, keeps):
    """(final states, {block: states}, (keys, values) of all blocks [L, B, G, T, W] if `keeps`)."""
    build = functools.partial(language_model.build_block, config, jnp.float32)
    rotate = language_model.rotation(config, layout.positions)
    mask_BxTxA = _mask(layout, language_model.window(config), prefix)

    def call(carry, block):
        own, (block_parameters, before) = [], block

        def attend(query_BxHxTxW, key_BxGxTxW, value_BxGxTxW):
            query_BxHxTxW, key_BxGxTxW = rotate(query_BxHxTxW), rotate(key_BxGxTxW)
            own.append((key_BxGxTxW, value_BxGxTxW))
            return _attention(query_BxHxTxW, *own[0], mask_BxTxA, before)

        x_BxTxD, input_BxTxD = modules.bind(build, block_parameters)(carry[0], attend)
        return (x_BxTxD, input_BxTxD), own[0] if keeps else None

    x_BxTxD = language_model.embed(parameters, config, layout.tokens, layout.positions)
    carry, block_inputs, kept, start = (x_BxTxD, x_BxTxD), {}, [], 0
    for stop in sorted({*input_blocks, config.blocks}):
        part = jax.tree.map(lambda array, first=start, last=stop: array[first:last], (parameters["h"], prefix))
        carry, own = jax.lax.scan(call, carry, part)
        block_inputs[stop], start = carry[1], stop
        kept.append(own)
    final_BxTxD = language_model.final_norm(parameters, config, carry[0])
    return final_BxTxD, {block: block_inputs[block] for block in input_blocks}, kept[0] if keeps else None


def _mask(layout: Layout, window: int, prefix: Prefix | None) -> jax.Array:
    """Additive mask [B, T, A], the prefix first: 0 where a token attends to another, else minus infinity."""
    (query_BxTx1, key_Bx1xT), places_T = _pairs(layout.positions), jnp.arange(layout.positions.shape[1])
    seen_BxTxT = places_T[:, None] >= places_T
    query_documents, key_documents = _pairs(layout.documents)
    query_branches, key_branches = _pairs(layout.branches)
    seen_BxTxT &= query_documents == key_documents
    seen_BxTxT &= (key_branches == 0) | (query_branches == key_branches)
    if window:
        seen_BxTxT &= query_BxTx1 - key_Bx1xT < window
    if prefix is not None:
        behind = query_BxTx1 - jnp.arange(prefix.keys.shape[2])
        is_seen = behind < window if window else behind >= 0
        seen_BxTxT = jnp.concatenate([is_seen, seen_BxTxT], axis=2)
    return jnp.where(seen_BxTxT, 0.0, -jnp.inf)


def _pairs(values_BxT: jax.Array) -> tuple[jax.Array, jax.Array]:
    return values_BxT[:, :, None], values_BxT[:, None, :]


def _attention(query_BxHxTxW, key_BxGxTxW, value_BxGxTxW, mask_BxTxA, before: Prefix | None) -> jax.Array:
    """Attention, [B, H, T, W], in chunks of queries, each with the keys up to its own."""
    if before is not None:
        shape = key_BxGxTxW.shape[:1] + before.keys.shape
        key_BxGxTxW, value_BxGxTxW = (
            jnp.concatenate([jnp.broadcast_to(first, shape), own], axis=2)
            for first, own in zip(before, (key_BxGxTxW, value_BxGxTxW), strict=True)
        )
    length, mixed = query_BxHxTxW.shape[2], []
    prefix_length = mask_BxTxA.shape[2] - length
    for start in range(0, length, _CHUNK):
        stop = min(start + _CHUNK, length)
        keys = slice(0, prefix_length + stop)
        mask_Bx1xTxA = mask_BxTxA[:, None, start:stop, keys]
        mixed.append(
            transformer.attention(
                query_BxHxTxW[:, :, start:stop], key_BxGxTxW[:, :, keys], value_BxGxTxW[:, :, keys], mask_Bx1xTxA
            )
        )
    return jnp.concatenate(mixed, axis=2)
