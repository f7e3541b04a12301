"""GPT-2 (Radford et al., 2019): the frozen language model whose hidden states are keys and memory inputs.

Dimensions: B sequences, T positions, D width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.models import modules

_WHOLE_SHARDS = 128  # vocabularies that this divides are cut over the mesh


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Dimensions of a GPT-2: the feed-forward layer has four times the width, embeddings in and out are tied."""

    vocab_size: int
    context_length: int
    width: int
    blocks: int
    heads: int
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads


class Attention(nnx.Module):
    """The two projections of self-attention; heads are an axis of their own, so that a mesh can divide them."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        heads = (config.heads, config.head_width)
        self.c_attn = nnx.LinearGeneral(
            config.width, (3, *heads), dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"logical_axes": ("embed", None, "heads", None)},
            bias_metadata={"logical_axes": (None, "heads", None)},
        )
        self.c_proj = nnx.LinearGeneral(
            heads, config.width, axis=(-2, -1), dtype=dtype, rngs=rngs,
            kernel_init=nnx.initializers.normal(0.02 / (2 * config.blocks) ** 0.5),
            kernel_metadata={"logical_axes": ("heads", None, "embed")},
            bias_metadata={"logical_axes": (None,)},
        )


class FeedForward(nnx.Module):
    """Two projections with the tanh approximation of GELU between them (`gelu_new`)."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.c_fc = nnx.Linear(
            config.width, 4 * config.width, dtype=dtype, rngs=rngs, kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"logical_axes": ("embed", "mlp")}, bias_metadata={"logical_axes": ("mlp",)},
        )
        self.c_proj = nnx.Linear(
            4 * config.width, config.width, dtype=dtype, rngs=rngs,
            kernel_init=nnx.initializers.normal(0.02 / (2 * config.blocks) ** 0.5),
            kernel_metadata={"logical_axes": ("mlp", "embed")}, bias_metadata={"logical_axes": (None,)},
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(nnx.gelu(self.c_fc(x), approximate=True))


class Block(nnx.Module):
    """One Transformer block."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.ln_1 = _layer_norm(config, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = _layer_norm(config, rngs)
        self.mlp = FeedForward(config, dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array, attend: Callable) -> tuple[jax.Array, jax.Array]:
        """(the block's output, the input of its feed-forward layer), both float32 [B, T, D].

        `attend` mixes positions: it maps queries, keys and values, each [B, H, T, K], to [B, H, T, K].
        """
        projected_BxTx3xHxK = self.attn.c_attn(self.ln_1(x_BxTxD))
        mixed_BxHxTxK = attend(*(projected_BxTx3xHxK[:, :, i].swapaxes(1, 2) for i in range(3)))
        x_BxTxD = x_BxTxD + self.attn.c_proj(mixed_BxHxTxK.swapaxes(1, 2))
        tap_BxTxD = self.ln_2(x_BxTxD)
        return x_BxTxD + self.mlp(tap_BxTxD), tap_BxTxD


class GPT2(nnx.Module):
    """The parameters of the whole network; blocks are stacked on a leading axis."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        # GPT-2's own vocabulary of 50,257 divides by nothing: it stays whole on a mesh that cuts vocabularies.
        vocab = "vocab" if config.vocab_size % _WHOLE_SHARDS == 0 else None
        self.wte = nnx.Embed(
            config.vocab_size, config.width, rngs=rngs, embedding_init=nnx.initializers.normal(0.02),
            embedding_metadata={"logical_axes": (vocab, "embed")},
        )
        self.wpe = nnx.Embed(
            config.context_length, config.width, rngs=rngs, embedding_init=nnx.initializers.normal(0.02),
            embedding_metadata={"logical_axes": ("position", "embed")},
        )
        self.h = modules.stack(functools.partial(Block, config, dtype), config.blocks, rngs)
        self.ln_f = _layer_norm(config, rngs)


def _layer_norm(config: GPT2Config, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.width, epsilon=config.norm_epsilon, dtype=jnp.float32, use_fast_variance=False, rngs=rngs,
        scale_metadata={"logical_axes": (None,)}, bias_metadata={"logical_axes": (None,)},
    )


def attention(
    query_BxHxTxK: jax.Array, key_BxHxSxK: jax.Array, value_BxHxSxK: jax.Array, mask_TxS: jax.Array
) -> jax.Array:
    """Attention of T positions to S positions, [B, H, T, K]; softmax in float32.

    `mask_TxS` is added to the scores: 0 where a position is seen, minus infinity where not; it may have leading axes.
    """
    # Batch axes in front of both products and an additive mask: a third faster on CPU than masking with a select.
    scores_BxHxTxS = jnp.einsum(
        "bhtk,bhsk->bhts", query_BxHxTxK * query_BxHxTxK.shape[-1] ** -0.5, key_BxHxSxK,
        preferred_element_type=jnp.float32,
    )
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS + mask_TxS, axis=-1).astype(value_BxHxSxK.dtype)
    return jnp.einsum("bhts,bhsk->bhtk", weights_BxHxTxS, value_BxHxSxK)


def causal_attention(query_BxHxTxK: jax.Array, key_BxHxTxK: jax.Array, value_BxHxTxK: jax.Array) -> jax.Array:
    """Attention of every position to itself and those before it, [B, H, T, K]."""
    length = query_BxHxTxK.shape[2]
    mask_TxT = jnp.where(jnp.tril(jnp.ones((length, length), bool)), 0.0, -jnp.inf)
    return attention(query_BxHxTxK, key_BxHxTxK, value_BxHxTxK, mask_TxT)


def init(config: GPT2Config, key: jax.Array) -> dict:
    """Fresh float32 parameters: normal of deviation 0.02, residual projections divided by sqrt(2 blocks)."""
    return modules.initialize(functools.partial(GPT2, config, jnp.float32), key)


def logical_axes(config: GPT2Config) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return modules.logical_axes(functools.partial(GPT2, config, jnp.float32))


def features(
    parameters: dict,
    config: GPT2Config,
    tokens_BxT: jax.Array,
    *,
    taps: tuple[int, ...] = (),
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    activations: jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Hidden states after the final norm, float32 [B, T, D], and those tapped inside.

    Tap b, counted from 1, is the input of block b's feed-forward layer, after that block's second norm,
    [B, T, D] in float32; b = blocks is the paper's key (section 3). Matrix products run in `compute_dtype`.
    Differentiated, matrix products are kept for the backward pass; with `remat` the input of each block alone.
    `activations` is the sharding of hidden states [B, T, D] on a mesh.

    Raises:
      ValueError: a tap is no block of the model, or T exceeds the context length.
    """
    if not all(1 <= tap <= config.blocks for tap in taps):
        raise ValueError(f"taps {taps}: each is a block, 1 to {config.blocks}")
    if tokens_BxT.shape[1] > config.context_length:
        raise ValueError(f"{tokens_BxT.shape[1]} tokens exceed the context length {config.context_length}")
    token_embedding_VxD = jnp.asarray(parameters["wte"]["embedding"])
    if activations is not None:
        # A look-up in a divided table would bring the hidden states of the whole batch together.
        whole = jax.sharding.NamedSharding(activations.mesh, jax.sharding.PartitionSpec())
        token_embedding_VxD = modules.constrain(token_embedding_VxD, whole)
    x_BxTxD = token_embedding_VxD[tokens_BxT] + parameters["wpe"]["embedding"][: tokens_BxT.shape[1]]
    x_BxTxD = modules.constrain(x_BxTxD, activations)

    def call(block: Block, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BxTxD, tap_BxTxD = block(carry[0], causal_attention)
        return modules.constrain(x_BxTxD, activations), tap_BxTxD

    # The carry holds the last block's tap: a scan that stops at a tapped block keeps that tap and no other.
    carry, tapped, start = (x_BxTxD, x_BxTxD), {}, 0
    build = functools.partial(Block, config, compute_dtype)
    for stop in sorted({*taps, config.blocks}):
        carry = modules.run(call, build, parameters["h"], carry, start=start, stop=stop, remat=remat)
        tapped[stop], start = carry[1], stop
    return final_norm(parameters, config, carry[0]), {tap: tapped[tap] for tap in taps}


def final_norm(parameters: dict, config: GPT2Config, x_BxTxD: jax.Array) -> jax.Array:
    """The norm between the last block and the output projection, float32 [B, T, D]."""
    return modules.bind(functools.partial(_layer_norm, config), parameters["ln_f"])(x_BxTxD)


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [D, V]: the token embedding transposed."""
    return parameters["wte"]["embedding"].T


def logits(
    parameters: dict,
    config: GPT2Config,
    tokens_BxT: jax.Array,
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Logits of the next token at every position, float32 [B, T, V]."""
    hidden_BxTxD, _ = features(parameters, config, tokens_BxT, compute_dtype=compute_dtype)
    kernel_DxV = output_kernel(parameters).astype(compute_dtype)
    return jnp.dot(hidden_BxTxD.astype(compute_dtype), kernel_DxV, preferred_element_type=jnp.float32)
