"""Shared by decoder-only Transformers: attention, running blocks while returning inputs of some, output projections.

Dimensions: B sequences, T positions, A positions that are attended to, D width, H heads of queries, G heads of keys
and values (a divisor of H), W width of a head, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mlpmem_jax.models import modules

_MOST_CHUNKS = 16  # maximum query chunks in causal attention; more take longer to compile than they save

Attend = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
"""Mixes positions: queries [B, H, T, W], keys and values [B, G, T, W] -> [B, H, T, W]."""


def attention(
    query_BxHxTxW: jax.Array, key_BxGxAxW: jax.Array, value_BxGxAxW: jax.Array, mask_TxA: jax.Array
) -> jax.Array:
    """Attention of T positions to A positions, [B, H, T, W]; softmax in float32.

    Query head h uses key and value head h // (H / G). `mask_TxA` is added to the scores: 0 where a position is visible,
    else minus infinity; it may have leading axes of size B and 1.
    """
    shape, repeats = query_BxHxTxW.shape, query_BxHxTxW.shape[1] // key_BxGxAxW.shape[1]
    if repeats > 1:  # heads that share keys are stacked like additional positions
        query_BxHxTxW = query_BxHxTxW.reshape(shape[0], -1, repeats * shape[2], shape[3])
        mask_TxA = jnp.concatenate([mask_TxA] * repeats, axis=-2)
    # Batch axes in front of both products and an additive mask: a third faster on CPU than masking with a select.
    scores_BxHxTxA = jnp.einsum(
        "bhtw,bhaw->bhta",
        query_BxHxTxW * query_BxHxTxW.shape[-1] ** -0.5,
        key_BxGxAxW,
        preferred_element_type=jnp.float32,
    )
    weights_BxHxTxA = jax.nn.softmax(scores_BxHxTxA + mask_TxA, axis=-1).astype(value_BxGxAxW.dtype)
    return jnp.einsum("bhta,bhaw->bhtw", weights_BxHxTxA, value_BxGxAxW).reshape(shape)


def causal_attention(
    query_BxHxTxW: jax.Array, key_BxGxTxW: jax.Array, value_BxGxTxW: jax.Array, window: int = 0
) -> jax.Array:
    """Attention of each position to itself and earlier ones, at most `window` in all (0 = no limit), [B, H, T, W].

    Uses chunks of queries, each with only the keys that it can see: half the products, and scores that fit a cache.
    """
    length, mixed = query_BxHxTxW.shape[2], []
    mask_TxT = causal_mask(length, window)
    chunk = 128 * -(-length // (128 * _MOST_CHUNKS))
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        queries, keys = slice(start, stop), slice(max(0, start - window) if window else 0, stop)
        mixed.append(
            attention(
                query_BxHxTxW[:, :, queries],
                key_BxGxTxW[:, :, keys],
                value_BxGxTxW[:, :, keys],
                mask_TxT[queries, keys],
            )
        )
    return jnp.concatenate(mixed, axis=2)


def attention_of_last(
    query_BxHx1xW: jax.Array,
    key_BxGx1xW: jax.Array,
    value_BxGx1xW: jax.Array,
    keys_BxGxAxW: jax.Array,
    values_BxGxAxW: jax.Array,
    mask_Bx1x1xA: jax.Array,
) -> jax.Array:
    """Attention of one position to those of a cache and to itself, [B, H, 1, W]; softmax in float32.

    The position itself is separate from the cache, because extending a cache before reading it copies it in every step.
    """
    shape, heads = query_BxHx1xW.shape, key_BxGx1xW.shape[1]
    query_BxGxHxW = query_BxHx1xW.reshape(shape[0], heads, -1, shape[-1]) * shape[-1] ** -0.5
    product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores_BxGxHxA = product("bghw,bgaw->bgha", query_BxGxHxW, keys_BxGxAxW) + mask_Bx1x1xA
    own_BxGxHx1 = product("bghw,bgaw->bgha", query_BxGxHxW, key_BxGx1xW)
    maximum_BxGxHx1 = jnp.maximum(own_BxGxHx1, scores_BxGxHxA.max(-1, keepdims=True))
    weights_BxGxHxA, own_BxGxHx1 = jnp.exp(scores_BxGxHxA - maximum_BxGxHx1), jnp.exp(own_BxGxHx1 - maximum_BxGxHx1)
    mixed_BxGxHxW = product("bgha,bgaw->bghw", weights_BxGxHxA.astype(values_BxGxAxW.dtype), values_BxGxAxW)
    mixed_BxGxHxW = mixed_BxGxHxW + own_BxGxHx1 * value_BxGx1xW
    mixed_BxGxHxW = mixed_BxGxHxW / (weights_BxGxHxA.sum(-1, keepdims=True) + own_BxGxHx1)
    return mixed_BxGxHxW.astype(query_BxHx1xW.dtype).reshape(shape)


def causal_mask(length: int, window: int = 0) -> jax.Array:
    """Additive mask [T, T]: each position sees itself and earlier ones, at most `window` in all; 0 = no limit."""
    before_TxT = jnp.arange(length)[:, None] - jnp.arange(length)
    seen_TxT = (before_TxT >= 0) & (before_TxT < (window or length))
    return jnp.where(seen_TxT, 0.0, -jnp.inf)


def check(config, input_blocks: tuple[int, ...], length: int) -> None:
    """Raises ValueError if an input block is not in the model, or a sequence exceeds its context length."""
    if not all(1 <= block <= config.blocks for block in input_blocks):
        raise ValueError(f"input_blocks {input_blocks}: each is a block, 1 to {config.blocks}")
    if length > config.context_length:
        raise ValueError(f"{length} tokens exceed the context length {config.context_length}")


@jax.named_scope("input")
def look_up(table_VxD: jax.Array, tokens_BxT: jax.Array, activations: jax.sharding.Sharding | None) -> jax.Array:
    """Rows of an embedding table, [B, T, D]."""
    table_VxD = jnp.asarray(table_VxD)
    if activations is not None:
        # A lookup in a sharded table would gather the hidden states of the whole batch.
        whole = jax.sharding.NamedSharding(activations.mesh, jax.sharding.PartitionSpec())
        table_VxD = modules.constrain(table_VxD, whole)
    return table_VxD[tokens_BxT]


def run_blocks(
    build: modules.Build,
    blocks: dict,
    x_BxTxD: jax.Array,
    attend: Attend,
    *,
    count: int,
    input_blocks: tuple[int, ...],
    remat: bool,
    activations: jax.sharding.Sharding | None,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """The last block's output and the input of the feed-forward layer of each of `input_blocks`, float32 [B, T, D].

    Args:
      build: builds a block, a module that maps (x, attend) to (output, input of its feed-forward layer).
      blocks: stacked parameters of `count` blocks.
      input_blocks: blocks whose inputs are returned, counted from 1.
      remat: whether to keep only the input of each block for the backward pass.
      activations: the sharding of [B, T, D] on a mesh.
    """

    def call(block, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BxTxD, input_BxTxD = block(carry[0], attend)
        return modules.constrain(x_BxTxD, activations), input_BxTxD

    attend = attend if activations is None else _by_batch(attend, activations)
    # The carry includes the last block's input, so a scan that stops at a block returns only that input.
    x_BxTxD = modules.constrain(x_BxTxD, activations)
    carry, block_inputs, start = (x_BxTxD, x_BxTxD), {}, 0
    for stop in sorted({*input_blocks, count}):
        carry = modules.run(call, build, blocks, carry, start=start, stop=stop, remat=remat)
        block_inputs[stop], start = carry[1], stop
    return carry[0], {stop: block_inputs[stop] for stop in input_blocks}


def _by_batch(attend: Attend, activations: jax.sharding.NamedSharding) -> Attend:
    """Wraps attention so that queries, keys and values are sharded along the batch like activations.

    If no mesh axis divides the heads, the compiler would otherwise have each device process the whole batch.
    """
    free = jax.sharding.PartitionSpec.UNCONSTRAINED
    spec = jax.sharding.PartitionSpec(activations.spec[0], free, free, free)
    placed = jax.sharding.NamedSharding(activations.mesh, spec)
    return lambda *arrays: modules.constrain(attend(*(modules.constrain(array, placed) for array in arrays)), placed)


def project(hidden: jax.Array, kernel_DxV: jax.Array, compute_dtype: jax.typing.DTypeLike) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D]; the product runs in `compute_dtype`."""
    kernel_DxV = kernel_DxV.astype(compute_dtype)
    return jnp.dot(hidden.astype(compute_dtype), kernel_DxV, preferred_element_type=jnp.float32)


def project_tied(hidden: jax.Array, table_VxD: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D], with the token embedding as output projection.

    The product runs in the embedding's dtype.
    """
    # Avoids transposing the embedding, which the compiler would copy in a loop over steps.
    return jnp.einsum("...d,vd->...v", hidden.astype(table_VxD.dtype), table_VxD, preferred_element_type=jnp.float32)
