"""The interface of frozen language models of every family: functions of a config and its parameters.

Each family is a module in FAMILIES with the functions to which those below dispatch, and

    NAMES               its names, values of `model_type` in config.json; one module may serve several
    Config              a hashable dataclass of the dimensions, with the fields of `Config` here
    EMBEDDING           key of the token embedding in the parameters, unique to the family
    CHECKPOINT          names and layout of its tensors in Hugging Face checkpoints (`models.checkpoint`)
    from_fields(fields) the config from the values of its `dataclasses.asdict`
    from_json(source), to_json(config)  the config in a Hugging Face config.json (`models.config_json`)
    forward_flops(config, length, output_projection), parameter_count(config, embeddings)

To add a family, add a module and its name to FAMILIES.

Dimensions: B sequences, T positions, D width, H heads, W width of a head, V vocabulary.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.models import gpt2, llama, transformer
from mlpmem_jax.models.checkpoint import CheckpointNames
from mlpmem_jax.models.config_json import ConfigJson

FAMILIES: tuple[ModuleType, ...] = (gpt2, llama)
_BY_NAME = {name: module for module in FAMILIES for name in module.NAMES}


class Config(Protocol):
    """The fields that every family's dimensions have."""

    vocab_size: int
    context_length: int
    width: int
    blocks: int
    heads: int
    norm_epsilon: float

    @property
    def feed_forward_width(self) -> int: ...

    @property
    def activation(self) -> str: ...


def _module(config: Config) -> ModuleType:
    for module in FAMILIES:
        if isinstance(config, module.Config):
            return module
    raise TypeError(f"{type(config).__name__} is not the config of any of the families {', '.join(_BY_NAME)}")


def _module_of(parameters: dict) -> ModuleType:
    for module in FAMILIES:
        if module.EMBEDDING in parameters:
            return module
    raise ValueError(f"parameters {sorted(parameters)} are not those of any of the families {', '.join(_BY_NAME)}")


def family(config: Config) -> str:
    """The family's name, one of its module's NAMES."""
    return getattr(config, "family", _module(config).NAMES[0])


def from_fields(fields: Mapping) -> Config:
    """The config from the values of its `dataclasses.asdict`, as stored in manifests; GPT-2 has no field "family".

    Raises:
      ValueError: this version does not know the family.
    """
    name = fields.get("family", gpt2.NAMES[0])
    if name not in _BY_NAME:
        raise ValueError(f"language models of family {name!r} are not known; expected one of {', '.join(_BY_NAME)}")
    return _BY_NAME[name].from_fields(fields)


def from_json(source: ConfigJson) -> Config:
    """The config that a Hugging Face config.json describes.

    Raises:
      UserError: it describes a model that this package does not implement.
    """
    source.check_allowed("model_type", source.family, tuple(_BY_NAME))
    return _BY_NAME[source.family].from_json(source)


def to_json(config: Config) -> dict:
    """The keys of config.json that describe the config."""
    return _module(config).to_json(config)


def checkpoint(name: str) -> CheckpointNames:
    """The checkpoint layout of the family with this name."""
    return _BY_NAME[name].CHECKPOINT


def forward_flops(config: Config, length: int, *, output_projection: bool = True) -> int:
    """FLOPs per position of a forward pass over sequences of `length` positions (see `models.flops`).

    Attention counts only visible positions, on average half of them, even if more are computed.
    """
    return _module(config).forward_flops(config, length, output_projection=output_projection)


def parameter_count(config: Config, *, embeddings: bool = True) -> int:
    """Number of parameters; without `embeddings`, those of the blocks and the final norm."""
    return _module(config).parameter_count(config, embeddings=embeddings)


def init(config: Config, key: jax.Array) -> dict:
    """Random float32 parameters: normal, standard deviation 0.02, residual projections divided by sqrt(2 blocks)."""
    return _module(config).init(config, key)


def abstract_parameters(config: Config) -> dict:
    """The tree of `init` with the shape and dtype of each array, as jax.ShapeDtypeStruct."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def logical_axes(config: Config) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return _module(config).logical_axes(config)


def features(
    parameters: dict,
    config: Config,
    tokens_BxT: jax.Array,
    *,
    input_blocks: tuple[int, ...] = (),
    compute_dtype: jax.typing.DTypeLike = jnp.float32,
    remat: bool = False,
    activations: jax.sharding.Sharding | None = None,
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Hidden states after the final norm, float32 [B, T, D], and {block: the input of its feed-forward layer}.

    The input of block b's feed-forward layer (b counts from 1) is the output of that block's second norm, [B, T, D] in
    float32; b = blocks is the paper's key (section 3). `input_blocks` are the blocks whose inputs are returned. Matrix
    products run in `compute_dtype`. The backward pass keeps matrix products; with `remat`, only the input of each
    block. `activations` is the sharding of hidden states [B, T, D] on a mesh.

    Raises:
      ValueError: one of `input_blocks` is not in the model, or T exceeds the context length.
    """
    length = tokens_BxT.shape[1]
    transformer.check(config, input_blocks, length)
    rotate, visible = rotation(config, jnp.arange(length)[None]), window(config)
    x_BxTxD, block_inputs = transformer.run_blocks(
        functools.partial(build_block, config, compute_dtype),
        parameters["h"],
        embed(parameters, config, tokens_BxT, slice(length), activations),
        lambda query, key, value: transformer.causal_attention(rotate(query), rotate(key), value, visible),
        count=config.blocks,
        input_blocks=input_blocks,
        remat=remat,
        activations=activations,
    )
    return final_norm(parameters, config, x_BxTxD), block_inputs


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [D, V], which may be the transposed token embedding."""
    return _module_of(parameters).output_kernel(parameters)


def logits(
    parameters: dict, config: Config, tokens_BxT: jax.Array, *, compute_dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Logits of the next token at every position, float32 [B, T, V]."""
    hidden_BxTxD, _ = features(parameters, config, tokens_BxT, compute_dtype=compute_dtype)
    return transformer.project(hidden_BxTxD, output_kernel(parameters), compute_dtype)


def embed(
    parameters: dict,
    config: Config,
    tokens_BxT: jax.Array,
    positions: jax.Array | slice,
    activations: jax.sharding.Sharding | None = None,
) -> jax.Array:
    """The input of the first block, float32 [B, T, D], at any positions below the context length.

    `positions` are int [B, T], or a slice of T positions for all sequences; `activations` is as in `features`.
    """
    return _module(config).embed(parameters, config, tokens_BxT, positions, activations)


def build_block(config: Config, compute_dtype: jax.typing.DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    """One block: maps (x [B, T, D], attend) to (output, input of its feed-forward layer), all three float32.

    Matrix products run in `compute_dtype`, which is also the dtype of the queries, keys and values passed to
    `attend`; `attend` must apply `rotation` to queries and keys.
    """
    return _module(config).Block(config, compute_dtype, rngs)


def rotation(config: Config, positions_BxT: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A function that rotates queries and keys [B, H, T, W] by position; the identity for GPT-2."""
    return _module(config).rotation(config, positions_BxT)


def window(config: Config) -> int:
    """Number of positions that a position sees, including itself; 0 = all earlier ones."""
    return _module(config).window(config)


def final_norm(parameters: dict, config: Config, x: jax.Array) -> jax.Array:
    """The norm between the last block and the output projection, float32 [..., D]."""
    return _module(config).final_norm(parameters, config, x)


def vocabulary_logits(parameters: dict, config: Config, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D] after the final norm.

    The product runs in the parameters' dtype.
    """
    return _module(config).vocabulary_logits(parameters, hidden)
