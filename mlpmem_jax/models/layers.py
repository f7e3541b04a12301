"""Layers shared by several networks: norms and feed-forward layers. Norms run in float32.

A `config` here is the dimensions of any network with width, feed_forward_width, blocks and activation.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx

ACTIVATIONS = {
    "gelu_new": functools.partial(jax.nn.gelu, approximate=True),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@jax.custom_vjp
def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x [..., I] times kernel [I, O], whose kernel gradient CPUs compute as fast as the product itself."""
    return jnp.dot(x, kernel)


def _product_forward(x, kernel):
    return jnp.dot(x, kernel), (x, kernel)


def _product_backward(factors, gradient):
    x, kernel = factors
    x_NxI, gradient_NxO = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
    return jnp.dot(gradient, kernel.T), transposed_product(x_NxI, gradient_NxO)


product.defvjp(_product_forward, _product_backward)


def transposed_product(x_NxI: jax.Array, y_NxO: jax.Array, **keywords) -> jax.Array:
    """x.T @ y, [I, O]; keywords are those of `jnp.dot`.

    XLA's CPU library takes up to twice as long for a product whose left factor is stored by columns, so on CPUs the
    narrower factor is transposed first; other devices choose their own layouts.
    """

    def rows_first(x_NxI, y_NxO):
        if x_NxI.shape[1] > y_NxO.shape[1]:
            return jax.lax.optimization_barrier(rows_first(y_NxO, x_NxI)).T
        return jnp.dot(jax.lax.optimization_barrier(x_NxI.T), y_NxO, **keywords)

    return jax.lax.platform_dependent(
        x_NxI, y_NxO, cpu=rows_first, default=lambda x_NxI, y_NxO: jnp.dot(x_NxI.T, y_NxO, **keywords)
    )


def _linear_dot(x, kernel, dimension_numbers, **keywords):
    """`product` with the signature that nnx.Linear needs: contracts the last axis of x with the first of the kernel."""
    del dimension_numbers, keywords
    return product(x, kernel)


class FeedForward(nnx.Module):
    """GPT-2's feed-forward layer: two projections with biases."""

    def __init__(self, config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.activate = ACTIVATIONS[config.activation]
        self.c_fc = _into(config, dtype, rngs, use_bias=True)
        self.c_proj = _out_of(config, dtype, rngs, use_bias=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.c_proj(self.activate(self.c_fc(x)))


class GatedFeedForward(nnx.Module):
    """The feed-forward layer of Llama and Mistral: SwiGLU, no biases."""

    def __init__(self, config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.activate = ACTIVATIONS[config.activation]
        self.gate_proj = _into(config, dtype, rngs, use_bias=False)
        self.up_proj = _into(config, dtype, rngs, use_bias=False)
        self.down_proj = _out_of(config, dtype, rngs, use_bias=False)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self.activate(self.gate_proj(x)) * self.up_proj(x))


def _into(config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs, use_bias: bool) -> nnx.Linear:
    return nnx.Linear(
        config.width,
        config.feed_forward_width,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
        dot_general=_linear_dot,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"logical_axes": ("embed", "mlp")},
        bias_metadata={"logical_axes": ("mlp",)},
    )


def _out_of(config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs, use_bias: bool) -> nnx.Linear:
    return nnx.Linear(
        config.feed_forward_width,
        config.width,
        use_bias=use_bias,
        dtype=dtype,
        rngs=rngs,
        dot_general=_linear_dot,
        kernel_init=residual_init(config.blocks),
        kernel_metadata={"logical_axes": ("mlp", "embed")},
        bias_metadata={"logical_axes": (None,)},
    )


def residual_init(blocks: int) -> nnx.Initializer:
    """GPT-2's initializer for projections into the residual stream: standard deviation 0.02 / sqrt(2 blocks)."""
    return nnx.initializers.normal(0.02 / (2 * blocks) ** 0.5)


def layer_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """LayerNorm with a scale and a bias."""
    return nnx.LayerNorm(
        width,
        epsilon=epsilon,
        dtype=jnp.float32,
        use_fast_variance=False,
        rngs=rngs,
        scale_metadata={"logical_axes": (None,)},
        bias_metadata={"logical_axes": (None,)},
    )


def rms_norm(width: int, epsilon: float, rngs: nnx.Rngs) -> nnx.RMSNorm:
    """RMSNorm with a scale."""
    return nnx.RMSNorm(width, epsilon=epsilon, dtype=jnp.float32, rngs=rngs, scale_metadata={"logical_axes": (None,)})


def embedding(rows: int, width: int, logical_axis: str | None, rngs: nnx.Rngs) -> nnx.Embed:
    """A table of `rows` vectors, sharded along `logical_axis` and the width."""
    return nnx.Embed(
        rows,
        width,
        rngs=rngs,
        embedding_init=nnx.initializers.normal(0.02),
        embedding_metadata={"logical_axes": (logical_axis, "embed")},
    )


def vocabulary_axis(vocab_size: int) -> str | None:
    """The logical axis of a vocabulary: None if no mesh divides it, as for GPT-2's 50,257."""
    return "vocab" if vocab_size % 128 == 0 else None
