"""Frozen language models of every family, as the stages see them: functions of a config and its parameters.

Each family is a module with the functions below; the type of the config says which. Every config has vocab_size,
context_length, width, blocks, feed_forward_width, norm_epsilon and activation.

Dimensions: B sequences, T positions, D width, H heads, K width of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.models import gpt2, llama
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.models.rotary import Rotary

Config = GPT2Config | LlamaConfig


def _module(config: Config) -> ModuleType:
    return gpt2 if isinstance(config, GPT2Config) else llama


def family(config: Config) -> str:
    """The family's name: "gpt2", "llama" or "mistral"."""
    return "gpt2" if isinstance(config, GPT2Config) else config.family


def from_fields(fields: Mapping) -> Config:
    """The config whose `dataclasses.asdict` these values are, as manifests keep it; GPT-2 has no field "family".

    Raises:
      ValueError: a family that this version does not know.
    """
    name = fields.get("family", "gpt2")
    if name == "gpt2":
        return GPT2Config(**fields)
    if name in ("llama", "mistral"):
        return LlamaConfig(**{**fields, "rotary": Rotary(**fields["rotary"])})
    raise ValueError(f"language models of family {name!r} are not known; expected gpt2, llama or mistral")


def init(config: Config, key: jax.Array) -> dict:
    """Fresh float32 parameters: normal of deviation 0.02, residual projections divided by sqrt(2 blocks)."""
    return _module(config).init(config, key)


def logical_axes(config: Config) -> dict:
    """The tree of `init` with the tuple of logical axis names of each array."""
    return _module(config).logical_axes(config)


def features(
    parameters: dict,
    config: Config,
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
    return _module(config).features(
        parameters, config, tokens_BxT, taps=taps, compute_dtype=compute_dtype, remat=remat, activations=activations
    )


def output_kernel(parameters: dict) -> jax.Array:
    """The output projection [D, V], of its own or the token embedding transposed."""
    return (gpt2 if "wte" in parameters else llama).output_kernel(parameters)


def logits(
    parameters: dict, config: Config, tokens_BxT: jax.Array, *, compute_dtype: jax.typing.DTypeLike = jnp.float32
) -> jax.Array:
    """Logits of the next token at every position, float32 [B, T, V]."""
    return _module(config).logits(parameters, config, tokens_BxT, compute_dtype=compute_dtype)


def embed(parameters: dict, config: Config, tokens_BxT: jax.Array, positions_BxT: jax.Array) -> jax.Array:
    """The input of the first block, float32 [B, T, D], at any positions below the context length."""
    return _module(config).embed(parameters, config, tokens_BxT, positions_BxT)


def build_block(config: Config, rngs: nnx.Rngs) -> nnx.Module:
    """One block in float32: maps (x [B, T, D], attend) to (output, input of its feed-forward layer).

    What it hands to `attend` are queries, keys and values; the first two want `rotation` before they are compared.
    """
    return _module(config).Block(config, jnp.float32, rngs)


def rotation(config: Config, positions_BxT: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """What turns queries and keys [B, H, T, K] by their positions; GPT-2 leaves them as they are."""
    return (lambda x: x) if isinstance(config, GPT2Config) else llama.rotation(config, positions_BxT)


def window(config: Config) -> int:
    """Positions that a position sees, itself included; 0 = all before it."""
    return 0 if isinstance(config, GPT2Config) else config.sliding_window


def final_norm(parameters: dict, config: Config, x: jax.Array) -> jax.Array:
    """The norm between the last block and the output projection, float32 [..., D]."""
    return _module(config).final_norm(parameters, config, x)


def vocabulary_logits(parameters: dict, config: Config, hidden: jax.Array) -> jax.Array:
    """Logits, float32 [..., V], of hidden states [..., D] after the final norm."""
    return _module(config).vocabulary_logits(parameters, hidden)
