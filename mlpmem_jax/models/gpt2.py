"""GPT-2 (Radford et al., 2019): the frozen language model whose hidden states are keys and memory inputs.

Dimensions: B sequences, T positions, D width, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.models import layers, modules, transformer
from mlpmem_jax.models.checkpoint import CheckpointNames
from mlpmem_jax.models.config_json import NUMBER, ConfigJson

NAMES = ("gpt2",)
EMBEDDING = "wte"
CHECKPOINT = CheckpointNames(
    prefix="transformer.",
    blocks="h",
    transposed=False,
    joined_axes={
        "attn.c_attn.kernel": ((0,), (1, 2, 3)),  # [D, 3, H, W] -> [D, 3 H W]
        "attn.c_attn.bias": ((0, 1, 2),),
        "attn.c_proj.kernel": ((0, 1), (2,)),  # [H, W, D] -> [H W, D]
    },
)
_SIZES = ("vocab_size", "n_positions", "n_embd", "n_layer", "n_head")  # keys of config.json
_IMPLEMENTED = {  # optional keys of config.json -> implemented values; the first is the default
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Dimensions of a GPT-2: the feed-forward layer has four times the width, input and output embeddings are tied."""

    vocab_size: int
    context_length: int
    width: int
    blocks: int
    heads: int
    norm_epsilon: float = 1e-5

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def feed_forward_width(self) -> int:
        return 4 * self.width

    @property
    def activation(self) -> str:
        return "gelu_new"


Config = GPT2Config


def from_fields(fields: Mapping) -> GPT2Config:
    """The config from the values of its `dataclasses.asdict`."""
    return GPT2Config(**fields)


def from_json(source: ConfigJson) -> GPT2Config:
    """The config that a Hugging Face config.json describes."""
    for key, allowed in _IMPLEMENTED.items():
        source.check_allowed(key, source.values.get(key, allowed[0]), allowed)
    vocab_size, context_length, width, blocks, heads = source.sizes(_SIZES)
    source.check_divides("n_head", heads, "n_embd", width)
    if source.optional("n_inner", 4 * width) != 4 * width:
        raise source.error(f"n_inner is {source.values['n_inner']}; only 4 x n_embd can be imported")
    epsilon = source.optional("layer_norm_epsilon", 1e-5, NUMBER)
    return GPT2Config(vocab_size, context_length, width, blocks, heads, epsilon)


def to_json(config: GPT2Config) -> dict:
    """The keys of config.json that describe the config."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_positions": config.context_length,
        "n_embd": config.width,
        "n_layer": config.blocks,
        "n_head": config.heads,
        "activation_function": config.activation,
        "layer_norm_epsilon": config.norm_epsilon,
        "tie_word_embeddings": True,
    }


class Attention(nnx.Module):
    """The two projections of self-attention; heads are a separate axis, so that a mesh can divide them."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        heads = (config.heads, config.head_width)
        self.c_attn = nnx.LinearGeneral(
            config.width,
            (3, *heads),
            dtype=dtype,
            rngs=rngs,
            kernel_init=nnx.initializers.normal(0.02),
            kernel_metadata={"logical_axes": ("embed", None, "heads", None)},
            bias_metadata={"logical_axes": (None, "heads", None)},
        )
        self.c_proj = nnx.LinearGeneral(
            heads,
            config.width,
            axis=(-2, -1),
            dtype=dtype,
            rngs=rngs,
            kernel_init=layers.residual_init(config.blocks),
            kernel_metadata={"logical_axes": ("heads", None, "embed")},
            bias_metadata={"logical_axes": (None,)},
        )


class Block(nnx.Module):
    """One Transformer block."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.ln_1 = layers.layer_norm(config.width, config.norm_epsilon, rngs)
        self.attn = Attention(config, dtype, rngs)
        self.ln_2 = layers.layer_norm(config.width, config.norm_epsilon, rngs)
        self.mlp = layers.FeedForward(config, dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array, attend: transformer.Attend) -> tuple[jax.Array, jax.Array]:
        """(the block's output, the input of its feed-forward layer), both float32 [B, T, D]."""
        projected_BxTx3xHxW = self.attn.c_attn(self.ln_1(x_BxTxD))
        mixed_BxHxTxW = attend(*(projected_BxTx3xHxW[:, :, i].swapaxes(1, 2) for i in range(3)))
        x_BxTxD = x_BxTxD + self.attn.c_proj(mixed_BxHxTxW.swapaxes(1, 2))
        input_BxTxD = self.ln_2(x_BxTxD)
        return x_BxTxD + self.mlp(input_BxTxD), input_BxTxD


class GPT2(nnx.Module):
    """The parameters of the whole network; blocks are stacked on a leading axis."""

    def __init__(self, config: GPT2Config, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.wte = layers.embedding(config.vocab_size, config.width, layers.vocabulary_axis(config.vocab_size), rngs)
        self.wpe = layers.embedding(config.context_length, config.width, "position", rngs)
        self.h = modules.stack(functools.partial(Block, config, dtype), config.blocks, rngs)
        self.ln_f = layers.layer_norm(config.width, config.norm_epsilon, rngs)


def init(config: GPT2Config, key: jax.Array) -> dict:
    """Random float32 parameters: normal, standard deviation 0.02, residual projections divided by sqrt(2 blocks)."""
    return modules.initialize(functools.partial(GPT2, config, jnp.float32), key)


def logical_axes(config: GPT2Config) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return modules.logical_axes(functools.partial(GPT2, config, jnp.float32))


def rotation(config: GPT2Config, positions_BxT: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """The identity: positions are part of the embedding."""
    del config, positions_BxT
    return lambda x: x


def window(config: GPT2Config) -> int:
    """Every position sees all earlier ones."""
    del config
    return 0


def embed(
    parameters: dict,
    config: GPT2Config,
    tokens_BxT: jax.Array,
    positions: jax.Array | slice,
    activations: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """The input of the first block, float32 [B, T, D]."""
    del config
    token_BxTxD = transformer.look_up(parameters["wte"]["embedding"], tokens_BxT, activations)
    return token_BxTxD.astype(jnp.float32) + parameters["wpe"]["embedding"][positions]


def final_norm(parameters: dict, config: GPT2Config, x_BxTxD: jax.Array) -> jax.Array:
    """The norm between the last block and the output projection, float32 [B, T, D]."""
    build = functools.partial(layers.layer_norm, config.width, config.norm_epsilon)
    return modules.bind(build, parameters["ln_f"])(x_BxTxD)


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [D, V]: the token embedding transposed."""
    return parameters["wte"]["embedding"].T


def vocabulary_logits(parameters: dict, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] of hidden states [..., D] after the final norm."""
    return transformer.project_tied(hidden, parameters["wte"]["embedding"])


def forward_flops(config: GPT2Config, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass over sequences of `length` positions.

    Attention counts only visible positions, on average length / 2, even if more are computed.
    """
    projections = 4 * config.blocks * config.width * (2 * config.width + 4 * config.width)
    attention = 2 * config.blocks * length * config.width
    return projections + attention + output_projection * 2 * config.width * config.vocab_size


def parameter_count(config: GPT2Config, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, those of the blocks and the final norm."""
    width = config.width
    blocks = config.blocks * (12 * width**2 + 13 * width) + 2 * width
    return blocks + embeddings * (config.vocab_size + config.context_length) * width
