"""Sides: the distributions that are mixed into a language model's, from the memory or from kNN search.

A side reads hidden states of the language model and returns probabilities of tokens. To add one, write a class with
the same members and add a line to `systems.Workdir.side`.

Dimensions: B states of the model, M scored tokens, U distinct states, K neighbors, D width, V vocabulary.
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
    """A distribution over tokens from hidden states.

    Attributes:
      block: the block of the language model, from 1, whose feed-forward input is read.
    """

    block: int

    def log_probabilities(
        self, states_BxD: jax.Array, places_M: np.ndarray, ids_M: np.ndarray
    ) -> np.ndarray | jax.Array:
        """log p(token), float [M], of tokens int32 [M], each given the state that its place indexes among B; minus
        infinity where the probability is 0."""

    def distributions(self, states_BxD: jax.Array, vocab_size: int) -> np.ndarray | jax.Array:
        """log p over a vocabulary, float [B, V]."""


class MemorySide:
    """The memory: p_MLP."""

    def __init__(self, parameters: dict, config: MemoryConfig, block: int):
        self.block, self._parameters, self._config = block, parameters, config

    def log_probabilities(self, states_BxD, places_M, ids_M):
        return _memory_choices(self._parameters, states_BxD, places_M, ids_M, config=self._config)

    def distributions(self, states_BxD, vocab_size):
        return _memory_rows(self._parameters, self._config, states_BxD, vocab_size=vocab_size)


_memory_rows = jax.jit(memory.log_probabilities, static_argnames=("config", "vocab_size"))


@functools.partial(jax.jit, static_argnames=("config",))
def _memory_choices(parameters, states_BxD, places_M, ids_M, *, config):
    logits_BxV = memory.logits(parameters, config, states_BxD)
    is_known_M = ids_M < config.vocab_size
    chosen_M = logits_BxV[places_M, jnp.where(is_known_M, ids_M, 0)]
    return jnp.where(is_known_M, chosen_M - jax.nn.logsumexp(logits_BxV, axis=1)[places_M], -jnp.inf)


class NeighborsSide:
    """kNN search over the datastore: p_kNN(y) is proportional to the sum over neighbors before y of exp(-d / T)."""

    def __init__(self, index, next_tokens_N: np.ndarray, block: int, k: int, temperature: float):
        """Creates a side over a search index.

        Args:
          index: with `search(queries_QxD, k) -> (squared distances [Q, K], ids [Q, K])`, ids of -1 for none.
          next_tokens_N: the token that follows each key.
          block: the last block of the language model, whose feed-forward input is the key.
          k: number of neighbors.
          temperature: T, in units of squared L2 distance.
        """
        self.block, self._index, self._next_tokens_N = block, index, next_tokens_N
        self._k, self._temperature = k, temperature

    def _weighted_tokens(self, states_BxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For B states: tokens int [B, K] and their weights float64 [B, K], which sum to 1 per state."""
        distances_BxK, ids_BxK = self._index.search(np.asarray(states_BxD, np.float32), self._k)
        weights_BxK = neighbor_weights(distances_BxK, self._temperature).astype(np.float64)
        return self._next_tokens_N[np.maximum(ids_BxK, 0)], weights_BxK / weights_BxK.sum(1, keepdims=True)

    def log_probabilities(self, states_BxD, places_M, ids_M):
        asked_U, numbers_M = np.unique(places_M, return_inverse=True)  # searches only for states with tokens to score
        tokens_UxK, weights_UxK = self._weighted_tokens(np.asarray(states_BxD)[asked_U])
        found_M = np.zeros(ids_M.shape)
        for tokens_U, weights_U in zip(tokens_UxK.T, weights_UxK.T, strict=True):
            found_M += np.where(tokens_U[numbers_M] == ids_M, weights_U[numbers_M], 0.0)
        with np.errstate(divide="ignore"):
            return np.log(found_M)

    def distributions(self, states_BxD, vocab_size):
        tokens_BxK, weights_BxK = self._weighted_tokens(np.asarray(states_BxD))
        found_BxV = np.zeros((len(tokens_BxK), vocab_size))
        np.add.at(found_BxV, (np.arange(len(tokens_BxK))[:, None], tokens_BxK), weights_BxK)
        with np.errstate(divide="ignore"):
            return np.log(found_BxV)
