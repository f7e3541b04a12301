"""Llama 2 and 3 (Touvron et al., 2023) and Mistral (Jiang et al., 2023), which adds a sliding window.

Dimensions: B sequences, T positions, D width, H heads of queries, G heads of keys and values, W width of a head,
V vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.models import layers, modules, rotary, rotary_json, transformer
from mlpmem_jax.models.checkpoint import CheckpointNames
from mlpmem_jax.models.config_json import NUMBER, ConfigJson
from mlpmem_jax.models.rotary import Rotary

NAMES = ("llama", "mistral")
EMBEDDING = "embed_tokens"
CHECKPOINT = CheckpointNames(
    prefix="model.",
    blocks="layers",
    transposed=True,
    joined_axes={
        "self_attn.q_proj.kernel": ((1, 2), (0,)),  # [D, H, W] -> [H W, D]
        "self_attn.k_proj.kernel": ((1, 2), (0,)),
        "self_attn.v_proj.kernel": ((1, 2), (0,)),
        "self_attn.o_proj.kernel": ((2,), (0, 1)),  # [H, W, D] -> [D, H W]
    },
)
_SIZES = (  # keys of config.json
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
)
_IMPLEMENTED = {"hidden_act": ("silu",), "attention_bias": (False,), "mlp_bias": (False,)}  # as in `gpt2`


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Dimensions of a Llama or a Mistral.

    Attributes:
      key_value_heads: number of key and value heads, a divisor of `heads`.
      head_width: even; need not be width / heads.
      sliding_window: number of positions that a position sees, including itself; 0 = all earlier ones.
      tied: whether the output projection is the token embedding.
      family: "llama" or "mistral".
    """

    vocab_size: int
    context_length: int
    width: int
    blocks: int
    heads: int
    key_value_heads: int
    head_width: int
    feed_forward_width: int
    norm_epsilon: float = 1e-6
    sliding_window: int = 0
    tied: bool = False
    rotary: Rotary = dataclasses.field(default_factory=Rotary)
    family: str = "llama"

    def __post_init__(self):
        if self.heads % self.key_value_heads:
            raise ValueError(f"{self.key_value_heads} heads of keys and values do not divide {self.heads} heads")

    @property
    def activation(self) -> str:
        return "silu"


Config = LlamaConfig


def from_fields(fields: Mapping) -> LlamaConfig:
    """The config from the values of its `dataclasses.asdict`."""
    return LlamaConfig(**{**fields, "rotary": Rotary(**fields["rotary"])})


def from_json(source: ConfigJson) -> LlamaConfig:
    """The config that a Hugging Face config.json describes."""
    family, values = source.family, source.values
    for key, allowed in _IMPLEMENTED.items():
        source.check_allowed(key, source.values.get(key, allowed[0]), allowed)
    vocab_size, positions, width, blocks, heads, feed_forward_width = source.sizes(_SIZES)
    if values.get("head_dim") is None:
        source.check_divides("num_attention_heads", heads, "hidden_size", width)
    head_width = source.optional("head_dim", width // heads)
    if head_width % 2:
        raise source.error(f"head_dim is {head_width}; rotary embeddings need an even one")
    default = 8 if family == "mistral" and "num_key_value_heads" not in values else heads
    key_value_heads = source.optional("num_key_value_heads", default)
    source.check_divides("num_key_value_heads", key_value_heads, "num_attention_heads", heads)
    embedding = rotary_json.from_json(source, positions)
    # This type's frequencies depend on the length, in order to exceed the config's positions.
    stretch = embedding.factor if embedding.type == "dynamic" else 1
    window = 0
    if family == "mistral":
        window = source.optional("sliding_window", 0 if "sliding_window" in values else 4096)
    return LlamaConfig(
        vocab_size=vocab_size,
        context_length=int(stretch * positions),
        width=width,
        blocks=blocks,
        heads=heads,
        key_value_heads=key_value_heads,
        head_width=head_width,
        feed_forward_width=feed_forward_width,
        norm_epsilon=source.optional("rms_norm_eps", 1e-6, NUMBER),
        sliding_window=window,
        tied=source.optional("tie_word_embeddings", False, (bool,)),
        rotary=embedding,
        family=family,
    )


def to_json(config: LlamaConfig) -> dict:
    """The keys of config.json that describe the config."""
    embedding = config.rotary
    values = {
        "architectures": [f"{config.family.capitalize()}ForCausalLM"],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": (
            embedding.original_length if embedding.type == "dynamic" else config.context_length
        ),
        "hidden_size": config.width,
        "num_hidden_layers": config.blocks,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.key_value_heads,
        "head_dim": config.head_width,
        "intermediate_size": config.feed_forward_width,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_epsilon,
        "tie_word_embeddings": config.tied,
        **rotary_json.to_json(embedding),
    }
    if config.family == "mistral":
        values["sliding_window"] = config.sliding_window or None
    return values


class Attention(nnx.Module):
    """The four projections of self-attention, without biases."""

    def __init__(self, config: LlamaConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.q_proj = _into_heads(config, config.heads, dtype, rngs)
        self.k_proj = _into_heads(config, config.key_value_heads, dtype, rngs)
        self.v_proj = _into_heads(config, config.key_value_heads, dtype, rngs)
        self.o_proj = nnx.LinearGeneral(
            (config.heads, config.head_width),
            config.width,
            axis=(-2, -1),
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
            kernel_init=layers.residual_init(config.blocks),
            kernel_metadata={"logical_axes": ("heads", None, "embed")},
        )


def _into_heads(config: LlamaConfig, heads: int, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(
        config.width,
        (heads, config.head_width),
        use_bias=False,
        dtype=dtype,
        rngs=rngs,
        kernel_init=nnx.initializers.normal(0.02),
        kernel_metadata={"logical_axes": ("embed", "heads", None)},
    )


class Block(nnx.Module):
    """One Transformer block."""

    def __init__(self, config: LlamaConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        self.input_layernorm = layers.rms_norm(config.width, config.norm_epsilon, rngs)
        self.self_attn = Attention(config, dtype, rngs)
        self.post_attention_layernorm = layers.rms_norm(config.width, config.norm_epsilon, rngs)
        self.mlp = layers.GatedFeedForward(config, dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array, attend: transformer.Attend) -> tuple[jax.Array, jax.Array]:
        """(the block's output, the input of its feed-forward layer), both float32 [B, T, D].

        `attend` gets queries and keys before rotation.
        """
        normed_BxTxD, attention = self.input_layernorm(x_BxTxD), self.self_attn
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        mixed_BxHxTxW = attend(*(project(normed_BxTxD).swapaxes(1, 2) for project in projections))
        x_BxTxD = x_BxTxD + attention.o_proj(mixed_BxHxTxW.swapaxes(1, 2))
        input_BxTxD = self.post_attention_layernorm(x_BxTxD)
        return x_BxTxD + self.mlp(input_BxTxD), input_BxTxD


class Llama(nnx.Module):
    """The parameters of the whole network; blocks are stacked on a leading axis."""

    def __init__(self, config: LlamaConfig, dtype: jax.typing.DTypeLike, rngs: nnx.Rngs):
        vocabulary = layers.vocabulary_axis(config.vocab_size)
        self.embed_tokens = layers.embedding(config.vocab_size, config.width, vocabulary, rngs)
        self.h = modules.stack(functools.partial(Block, config, dtype), config.blocks, rngs)
        self.norm = layers.rms_norm(config.width, config.norm_epsilon, rngs)
        if not config.tied:
            self.lm_head = nnx.Linear(
                config.width,
                config.vocab_size,
                use_bias=False,
                dtype=dtype,
                rngs=rngs,
                kernel_init=nnx.initializers.normal(0.02),
                kernel_metadata={"logical_axes": ("embed", vocabulary)},
            )


def init(config: LlamaConfig, key: jax.Array) -> dict:
    """Random float32 parameters: normal, standard deviation 0.02, residual projections divided by sqrt(2 blocks)."""
    return modules.initialize(functools.partial(Llama, config, jnp.float32), key)


def logical_axes(config: LlamaConfig) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return modules.logical_axes(functools.partial(Llama, config, jnp.float32))


def rotation(config: LlamaConfig, positions_BxT: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A function that rotates queries and keys [B, H, T, W] by position."""
    return rotary.rotation(config.rotary, config.head_width, positions_BxT)


def window(config: LlamaConfig) -> int:
    """Number of positions that a position sees, including itself; 0 = all earlier ones."""
    return config.sliding_window


def embed(
    parameters: dict,
    config: LlamaConfig,
    tokens_BxT: jax.Array,
    positions: jax.Array | slice,
    activations: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """The input of the first block, float32 [B, T, D]; positions enter through attention."""
    del config, positions
    return transformer.look_up(parameters["embed_tokens"]["embedding"], tokens_BxT, activations).astype(jnp.float32)


def final_norm(parameters: dict, config: LlamaConfig, x_BxTxD: jax.Array) -> jax.Array:
    """The norm between the last block and the output projection, float32 [B, T, D]."""
    build = functools.partial(layers.rms_norm, config.width, config.norm_epsilon)
    return modules.bind(build, parameters["norm"])(x_BxTxD)


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [D, V], which may be the transposed token embedding."""
    if "lm_head" in parameters:
        return parameters["lm_head"]["kernel"]
    return parameters["embed_tokens"]["embedding"].T


def vocabulary_logits(parameters: dict, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] of hidden states [..., D] after the final norm."""
    if "lm_head" in parameters:
        return transformer.project(hidden, parameters["lm_head"]["kernel"], parameters["lm_head"]["kernel"].dtype)
    return transformer.project_tied(hidden, parameters["embed_tokens"]["embedding"])


def forward_flops(config: LlamaConfig, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass over sequences of `length` positions."""
    attention_width = config.heads * config.head_width
    key_value_width = config.key_value_heads * config.head_width
    projections = 4 * config.blocks * config.width * (attention_width + key_value_width)
    feed_forward = 6 * config.blocks * config.width * config.feed_forward_width
    window = min(config.sliding_window or length, length)
    attention = 2 * config.blocks * attention_width * (2 * length - window) * window // length
    return projections + feed_forward + attention + output_projection * 2 * config.width * config.vocab_size


def parameter_count(config: LlamaConfig, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, those of the blocks and the final norm."""
    attention = 2 * config.width * config.head_width * (config.heads + config.key_value_heads)
    block = attention + 3 * config.width * config.feed_forward_width + 2 * config.width
    tables = 1 if config.tied else 2
    return config.blocks * block + config.width + embeddings * tables * config.vocab_size * config.width
