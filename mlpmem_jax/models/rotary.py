"""Rotary position embeddings (Su et al., 2021) and their extensions to longer contexts.

The variants are those of the `rope_parameters` of a Hugging Face config. Dimensions: B sequences, T positions,
H heads, W width of a head, F = W / 2 frequencies.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rotary:
    """Frequencies of rotary embeddings.

    Attributes:
      type: one of TYPES.
      theta: base of the wavelengths.
      factor: scaling of the context length; for all types except "default".
      original_length: context length before scaling; for "dynamic", "llama3" and "yarn".
      low_frequency_factor: "llama3": wavelengths above original_length / this are scaled fully.
      high_frequency_factor: "llama3": wavelengths below original_length / this are not scaled.
      beta_fast: "yarn": frequencies with more turns than this over original_length are not scaled.
      beta_slow: "yarn": frequencies with fewer turns than this are scaled fully.
      truncate: "yarn": whether the bounds between those two are rounded to whole frequencies.
      attention_factor: "yarn": factor of queries and keys.
    """

    type: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_length: int = 0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    def __post_init__(self):
        if self.type not in TYPES:
            raise ValueError(f"rotary embeddings of type {self.type!r}: expected one of {', '.join(TYPES)}")


def rotation(rotary: Rotary, head_width: int, positions_BxT: jax.Array) -> Callable[[jax.Array], jax.Array]:
    """A function that rotates queries and keys [B, H, T, W] by position; B may be 1 for all sequences."""
    frequencies_F = _frequencies(rotary, head_width, positions_BxT.max() + 1)
    angles_Bx1xTxF = positions_BxT[:, None, :, None].astype(jnp.float32) * frequencies_F
    cosine = jnp.cos(angles_Bx1xTxF) * rotary.attention_factor
    sine = jnp.sin(angles_Bx1xTxF) * rotary.attention_factor

    def rotate(x_BxHxTxW: jax.Array) -> jax.Array:
        first, second = jnp.split(x_BxHxTxW.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
        return turned.astype(x_BxHxTxW.dtype)

    return rotate


def _frequencies(rotary: Rotary, head_width: int, length: jax.Array) -> jax.Array | np.ndarray:
    """Radians per position, float32 [F], in sequences of `length` positions."""
    exponents_F = np.arange(0, head_width, 2) / head_width
    frequencies_F = rotary.theta**-exponents_F
    if rotary.type == "linear":
        frequencies_F = frequencies_F / rotary.factor
    elif rotary.type == "dynamic":
        longer = jnp.maximum(length, rotary.original_length) / rotary.original_length
        stretch = rotary.factor * longer - (rotary.factor - 1)
        frequencies_F = (rotary.theta * stretch ** (head_width / (head_width - 2))) ** -exponents_F
    elif rotary.type == "llama3":
        turns_F = rotary.original_length * frequencies_F / (2 * math.pi)
        low, high = rotary.low_frequency_factor, rotary.high_frequency_factor
        kept_F = np.clip((turns_F - low) / (high - low), 0, 1)
        frequencies_F = kept_F * frequencies_F + (1 - kept_F) * frequencies_F / rotary.factor
    elif rotary.type == "yarn":
        # A frequency with n turns over the original length has the index W log(length / 2 pi n) / (2 log theta).
        low, high = (
            head_width * math.log(rotary.original_length / (turns * 2 * math.pi)) / (2 * math.log(rotary.theta))
            for turns in (rotary.beta_fast, rotary.beta_slow)
        )
        if rotary.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, head_width - 1)
        stretched_F = np.clip((np.arange(head_width // 2) - low) / max(high - low, 0.001), 0, 1)
        frequencies_F = (1 - stretched_F) * frequencies_F + stretched_F * frequencies_F / rotary.factor
    return frequencies_F.astype(jnp.float32)
