"""What is mixed with a language model's distribution: its memory's, or that of kNN search.

A side reads hidden states of the language model and says how probable tokens are. Another one is a class with the same
members, and a line in `systems.open_sides`.

Dimensions: B texts, P positions, Q positions of all texts, K neighbors, C tokens, D width, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.models import memory
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval.distribution import neighbor_weights


class Side(Protocol):
    """What reads hidden states.

    Attributes:
      block: of the language model, from 1, whose feed-forward input is read.
    """

    block: int

    def log_probabilities(self, states_BxPxD: jax.Array, ids_BxPxC: np.ndarray) -> np.ndarray | jax.Array:
        """log p(token), float [B, P, C], of tokens int32 [B, P, C]; minus infinity where the probability is 0."""

    def distributions(self, states_BxD: jax.Array, vocab_size: int) -> np.ndarray | jax.Array:
        """log p over a vocabulary, float [B, V]."""


class MemorySide:
    """The memory: p_MLP."""

    def __init__(self, parameters: dict, config: MemoryConfig, block: int):
        self.block, self._parameters, self._config = block, parameters, config

    def log_probabilities(self, states_BxPxD, ids_BxPxC):
        return _memory_choices(self._parameters, states_BxPxD, jnp.asarray(ids_BxPxC), config=self._config)

    def distributions(self, states_BxD, vocab_size):
        return _memory_rows(self._parameters, states_BxD, config=self._config, vocab_size=vocab_size)


@functools.partial(jax.jit, static_argnames=("config", "vocab_size"))
def _memory_rows(parameters, states_BxD, *, config, vocab_size):
    """A base may have more rows than the memory has tokens: those have probability 0."""
    log_BxV = jax.nn.log_softmax(memory.logits(parameters, config, states_BxD)[..., : config.vocab_size])
    unknown = [(0, 0)] * (log_BxV.ndim - 1) + [(0, vocab_size - config.vocab_size)]
    return jnp.pad(log_BxV, unknown, constant_values=-jnp.inf)


@functools.partial(jax.jit, static_argnames=("config",))
def _memory_choices(parameters, states_BxPxD, ids_BxPxC, *, config):
    logits_BxPxV = memory.logits(parameters, config, states_BxPxD)
    known_BxPxC = ids_BxPxC < config.vocab_size
    chosen_BxPxC = jnp.take_along_axis(logits_BxPxV, jnp.where(known_BxPxC, ids_BxPxC, 0), axis=2)
    log_BxPxC = chosen_BxPxC - jax.nn.logsumexp(logits_BxPxV, axis=2, keepdims=True)
    return jnp.where(known_BxPxC, log_BxPxC, -jnp.inf)


class NeighborsSide:
    """kNN search over the datastore: p_kNN(y) is proportional to the sum over neighbors before y of exp(-d / T)."""

    def __init__(self, index, next_tokens_N: np.ndarray, block: int, k: int, temperature: float):
        """Over a search index.

        Args:
          index: with `search(queries_QxD, k) -> (squared distances [Q, K], ids [Q, K])`, ids of -1 for none.
          next_tokens_N: token after each key.
          block: the last of the language model, whose feed-forward input is the key.
          k: neighbors.
          temperature: T, in squared-L2 units.
        """
        self.block, self._index, self._next_tokens_N = block, index, next_tokens_N
        self._k, self._temperature = k, temperature

    def _weighted_tokens(self, states_QxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens int [Q, K] and their weights float64 [Q, K], which sum to 1."""
        distances_QxK, ids_QxK = self._index.search(np.asarray(states_QxD, np.float32), self._k)
        weights_QxK = neighbor_weights(distances_QxK, self._temperature).astype(np.float64)
        return self._next_tokens_N[np.maximum(ids_QxK, 0)], weights_QxK / weights_QxK.sum(1, keepdims=True)

    def log_probabilities(self, states_BxPxD, ids_BxPxC):
        states_BxPxD = np.asarray(states_BxPxD)
        tokens_QxK, weights_QxK = self._weighted_tokens(states_BxPxD.reshape(-1, states_BxPxD.shape[-1]))
        ids_QxC = ids_BxPxC.reshape(-1, ids_BxPxC.shape[-1])
        found_QxC = np.zeros(ids_QxC.shape)
        for neighbor in range(tokens_QxK.shape[1]):
            is_next_QxC = tokens_QxK[:, neighbor, None] == ids_QxC
            found_QxC += np.where(is_next_QxC, weights_QxK[:, neighbor, None], 0.0)
        with np.errstate(divide="ignore"):
            return np.log(found_QxC).reshape(ids_BxPxC.shape)

    def distributions(self, states_BxD, vocab_size):
        tokens_BxK, weights_BxK = self._weighted_tokens(np.asarray(states_BxD))
        found_BxV = np.zeros((len(tokens_BxK), vocab_size))
        np.add.at(found_BxV, (np.arange(len(tokens_BxK))[:, None], tokens_BxK), weights_BxK)
        with np.errstate(divide="ignore"):
            return np.log(found_BxV)
