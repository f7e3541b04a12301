"""Sides: the distributions that are mixed into a language model's, from the memory or from kNN search.

A side reads hidden states of the language model and returns probabilities of tokens. To add one, write a class with
the same members and add a line to `systems.Workdir.side`.

Dimensions: R positions, Q scored tokens, B texts, K neighbors, D width, V vocabulary.
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
        self, states_RxD: jax.Array, places_Q: np.ndarray, ids_Q: np.ndarray
    ) -> np.ndarray | jax.Array:
        """log p(token), float [Q], of tokens int32 [Q], each given the state that its place indexes among R; minus
        infinity where the probability is 0."""

    def distributions(self, states_BxD: jax.Array, vocab_size: int) -> np.ndarray | jax.Array:
        """log p over a vocabulary, float [B, V]."""


class MemorySide:
    """The memory: p_MLP."""

    def __init__(self, parameters: dict, config: MemoryConfig, block: int):
        self.block, self._parameters, self._config = block, parameters, config

    def log_probabilities(self, states_RxD, places_Q, ids_Q):
        return _memory_choices(self._parameters, states_RxD, places_Q, ids_Q, config=self._config)

    def distributions(self, states_BxD, vocab_size):
        return _memory_rows(self._parameters, self._config, states_BxD, vocab_size=vocab_size)


_memory_rows = jax.jit(memory.log_probabilities, static_argnames=("config", "vocab_size"))


@functools.partial(jax.jit, static_argnames=("config",))
def _memory_choices(parameters, states_RxD, places_Q, ids_Q, *, config):
    logits_RxV = memory.logits(parameters, config, states_RxD)
    is_known_Q = ids_Q < config.vocab_size
    chosen_Q = logits_RxV[places_Q, jnp.where(is_known_Q, ids_Q, 0)]
    return jnp.where(is_known_Q, chosen_Q - jax.nn.logsumexp(logits_RxV, axis=1)[places_Q], -jnp.inf)


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

    def _weighted_tokens(self, states_SxD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """For S states: tokens int [S, K] and their weights float64 [S, K], which sum to 1 per state."""
        distances_SxK, ids_SxK = self._index.search(np.asarray(states_SxD, np.float32), self._k)
        weights_SxK = neighbor_weights(distances_SxK, self._temperature).astype(np.float64)
        return self._next_tokens_N[np.maximum(ids_SxK, 0)], weights_SxK / weights_SxK.sum(1, keepdims=True)

    def log_probabilities(self, states_RxD, places_Q, ids_Q):
        asked_S, numbers_Q = np.unique(places_Q, return_inverse=True)  # searches only for states with tokens to score
        tokens_SxK, weights_SxK = self._weighted_tokens(np.asarray(states_RxD)[asked_S])
        found_Q = np.zeros(ids_Q.shape)
        for tokens_S, weights_S in zip(tokens_SxK.T, weights_SxK.T, strict=True):
            found_Q += np.where(tokens_S[numbers_Q] == ids_Q, weights_S[numbers_Q], 0.0)
        with np.errstate(divide="ignore"):
            return np.log(found_Q)

    def distributions(self, states_BxD, vocab_size):
        tokens_BxK, weights_BxK = self._weighted_tokens(np.asarray(states_BxD))
        found_BxV = np.zeros((len(tokens_BxK), vocab_size))
        np.add.at(found_BxV, (np.arange(len(tokens_BxK))[:, None], tokens_BxK), weights_BxK)
        with np.errstate(divide="ignore"):
            return np.log(found_BxV)
