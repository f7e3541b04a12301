"""Sampling the next token from its distribution."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from mlpmem_jax.core.errors import UserError

_LEAST, _MOST = 1e-6, 1e9


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is sampled. Temperature 0 is greedy; top_k 0 and top_p 1 keep all tokens.

    Values beyond the bounds are refused: in float32 they may be 0 or infinite, which leaves no distribution.

    Raises:
      UserError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, allowed, words in (
            ("temperature", self.temperature == 0 or _LEAST <= self.temperature <= _MOST, f"0, or {_LEAST} to {_MOST}"),
            ("top_k", self.top_k >= 0, "0 or more"),
            ("top_p", _LEAST <= self.top_p <= 1, f"{_LEAST} to 1"),
        ):
            if not allowed:
                raise UserError(f"{name} is {getattr(self, name)}; expected {words}")


GREEDY = Sampling()


def sample(log_probabilities_BxV: jax.Array, key: jax.Array, sampling: Sampling) -> jax.Array:
    """Samples one token per row, int32 [B]."""
    if sampling.temperature == 0:
        return jnp.argmax(log_probabilities_BxV, axis=-1).astype(jnp.int32)
    kept_BxV = keep(jax.nn.log_softmax(log_probabilities_BxV / sampling.temperature), sampling)
    return jax.random.categorical(key, kept_BxV, axis=-1).astype(jnp.int32)


def keep(log_probabilities_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """The log-probabilities with minus infinity at tokens that top_k, and then top_p, exclude.

    First the k most probable tokens are kept; of those, the fewest most probable ones whose probabilities sum to at
    least top_p. Ties with the last kept token are kept too.
    """
    if sampling.top_k:
        count = min(sampling.top_k, log_probabilities_BxV.shape[-1])
        least_Bx1 = jax.lax.top_k(log_probabilities_BxV, count)[0][:, -1:]
        log_probabilities_BxV = jnp.where(log_probabilities_BxV >= least_Bx1, log_probabilities_BxV, -jnp.inf)
    if sampling.top_p < 1:
        sorted_BxV = jnp.sort(jax.nn.softmax(log_probabilities_BxV), axis=-1, descending=True)
        before_BxV = jnp.cumsum(sorted_BxV, axis=-1) - sorted_BxV
        least_Bx1 = jnp.min(jnp.where(before_BxV < sampling.top_p, sorted_BxV, jnp.inf), axis=-1, keepdims=True)
        inside_BxV = jax.nn.softmax(log_probabilities_BxV) >= least_Bx1
        log_probabilities_BxV = jnp.where(inside_BxV, log_probabilities_BxV, -jnp.inf)
    return log_probabilities_BxV
