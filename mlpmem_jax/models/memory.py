"""The MLP memory: residual feed-forward blocks that map a hidden state to next-token logits.

Section 3 of the paper "MLP Memory" (arXiv 2508.01832). Positions are independent. Family `gpt2` has the feed-forward
layers of GPT-2 (LayerNorm, two projections), family `llama` those of Llama and Mistral (RMSNorm, SwiGLU).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.models import layers, modules, transformer


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
    """Dimensions of a memory; `padded_vocab_size` is the vocabulary rounded up so that the mesh divides it."""

    family: str
    vocab_size: int
    padded_vocab_size: int
    input_width: int
    width: int
    blocks: int
    feed_forward_width: int
    norm_epsilon: float = 1e-5
    activation: str = "gelu_new"

    def __post_init__(self):
        if self.family not in ("gpt2", "llama"):
            raise ValueError(f"memory family {self.family!r}: expected 'gpt2' or 'llama'")
        if self.activation not in layers.ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r}: expected one of {sorted(layers.ACTIVATIONS)}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} < vocab_size {self.vocab_size}")


class Block(nnx.Module):
    """x + feed_forward(norm(x)); the residual stream is float32."""

    def __init__(self, config: MemoryConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.norm = _norm(config, rngs)
        feed_forward = layers.FeedForward if config.family == "gpt2" else layers.GatedFeedForward
        self.mlp = feed_forward(config, dtype, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return x + self.mlp(self.norm(x))


class Memory(nnx.Module):
    """The parameters of the whole network; blocks are stacked on a leading axis."""

    def __init__(self, config: MemoryConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        if config.input_width != config.width:
            self.embedding_transform = _transform(config, dtype, rngs)
        self.h = modules.stack(functools.partial(Block, config, dtype), config.blocks, rngs)
        self.final_norm = _norm(config, rngs)
        self.lm_head = nnx.Linear(
            config.width,
            config.padded_vocab_size,
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"logical_axes": ("embed", "vocab")},
        )


def _transform(config: MemoryConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        config.input_width,
        config.width,
        dtype=dtype,
        rngs=rngs,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"logical_axes": ("embed", None)},
        bias_metadata={"logical_axes": (None,)},
    )


def _norm(config: MemoryConfig, rngs: nnx.Rngs) -> nnx.LayerNorm | nnx.RMSNorm:
    norm = layers.rms_norm if config.family == "llama" else layers.layer_norm
    return norm(config.width, config.norm_epsilon, rngs)


def init(config: MemoryConfig, key: jax.Array, output_kernel_DxV: jax.Array | None = None) -> dict:
    """Random float32 parameters: normal, standard deviation 0.02, residual projections divided by sqrt(2 blocks).

    With `output_kernel_DxV` ([width, vocab_size], the base LM's) the output projection is initialized from it, padded
    with zeros to the padded vocabulary; raises ValueError if its shape differs.
    """
    parameters = modules.initialize(functools.partial(Memory, config, jnp.float32), key)
    if output_kernel_DxV is not None:
        expected = (config.width, config.vocab_size)
        if output_kernel_DxV.shape != expected:
            raise ValueError(f"the output projection to start from is {output_kernel_DxV.shape}, expected {expected}")
        padding = ((0, 0), (0, config.padded_vocab_size - config.vocab_size))
        parameters["lm_head"]["kernel"] = jnp.pad(output_kernel_DxV.astype(jnp.float32), padding)
    return parameters


def abstract_parameters(config: MemoryConfig) -> dict:
    """The tree of `init` with the shape and dtype of each array, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: MemoryConfig) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return modules.logical_axes(functools.partial(Memory, config, jnp.float32))


def hidden(
    parameters: dict,
    config: MemoryConfig,
    inputs_BxD: jax.Array,
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
) -> jax.Array:
    """Hidden states after the final norm, float32 [..., width], of inputs [..., input_width].

    Matrix products run in `compute_dtype`; norms and the residual stream in float32. The backward pass
    keeps matrix products; with `remat`, only the input of each block. `parallel_memory.hidden` is the version with
    explicit collectives for a mesh.
    """
    x_BxD = transform_input(parameters.get("embedding_transform"), config, inputs_BxD, compute_dtype)
    build = functools.partial(Block, config, compute_dtype)
    x_BxD = modules.run(Block.__call__, build, parameters["h"], x_BxD, remat=remat)
    return final_norm(parameters["final_norm"], config, x_BxD)


@jax.named_scope("input")
def transform_input(
    transform: dict | None, config: MemoryConfig, inputs_BxD: jax.Array, compute_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """The float32 residual stream that enters the first block; projected where widths differ."""
    if config.input_width != config.width:
        inputs_BxD = modules.bind(functools.partial(_transform, config, compute_dtype), transform)(inputs_BxD)
    return inputs_BxD.astype(jnp.float32)


def final_norm(parameters: dict, config: MemoryConfig, x_BxD: jax.Array) -> jax.Array:
    """The norm after the last block."""
    return modules.bind(functools.partial(_norm, config), parameters)(x_BxD)


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [width, padded vocabulary]."""
    return parameters["lm_head"]["kernel"]


def log_probabilities(parameters: dict, config: MemoryConfig, inputs_BxD: jax.Array, vocab_size: int) -> jax.Array:
    """log p_MLP, float32 [..., vocab_size]; minus infinity for tokens beyond the memory's vocabulary.

    Matrix products run in the dtype that the parameters have.
    """
    logits_BxV = logits(parameters, config, inputs_BxD, compute_dtype=output_kernel(parameters).dtype)
    log_BxV = jax.nn.log_softmax(logits_BxV[..., : config.vocab_size])
    unknown = [(0, 0)] * (log_BxV.ndim - 1) + [(0, vocab_size - config.vocab_size)]
    return jnp.pad(log_BxV, unknown, constant_values=-jnp.inf)


def logits(
    parameters: dict,
    config: MemoryConfig,
    inputs_BxD: jax.Array,
    *,
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
) -> jax.Array:
    """Next-token logits, float32 [..., padded vocabulary], with minus infinity at the padding."""
    hidden_BxD = hidden(parameters, config, inputs_BxD, compute_dtype=compute_dtype)
    logits_BxV = transformer.project(hidden_BxD, output_kernel(parameters), compute_dtype)
    return jnp.where(jnp.arange(config.padded_vocab_size) < config.vocab_size, logits_BxV, -jnp.inf)
