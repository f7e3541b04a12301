"""Where the memory helps: the gain over the base by kind of position.

Positions are grouped by how often the next token occurs in the training text, by how often the preceding tokens occur
there as a sequence, and by how uncertain the base is. Pure functions of arrays.

Dimensions: N positions, C tokens of a chunk of text, U distinct 4-grams.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from mlpmem_jax.evaluation.intervals import mean_interval

CONTEXT = 4
"""Length of the counted contexts, in tokens before the next one."""

TOKEN_COUNTS = (0, 1, 10, 100, 1_000, 10_000, 100_000)
CONTEXT_COUNTS = (0, 1, 2, 5, 10, 100)
ENTROPIES = (0, 1, 2, 3, 4, 5, 6, 7)
"""Lower edges of the bins: occurrences, occurrences, nats; the last bins are unbounded above."""


class ContextCounter:
    """Counts how often given 4-grams occur in a text that is read in chunks."""

    def __init__(self, contexts_Nx4: np.ndarray, vocab_size: int) -> None:
        """Takes the 4-grams to count, int; they may repeat."""
        self._vocab_size = vocab_size
        pairs_Nx2 = contexts_Nx4[:, ::2].astype(np.int64) * vocab_size + contexts_Nx4[:, 1::2]
        # With a large vocabulary, four tokens do not fit in 64 bits, so pairs of tokens are numbered first.
        self._pairs, places_Nx2 = np.unique(pairs_Nx2, return_inverse=True)
        places_Nx2 = places_Nx2.reshape(pairs_Nx2.shape)
        keys_N = places_Nx2[:, 0] * len(self._pairs) + places_Nx2[:, 1]
        self._keys_U, self._inverse_N = np.unique(keys_N, return_inverse=True)
        self._counts_U = np.zeros(len(self._keys_U), np.int64)
        self._tail = np.empty(0, np.int64)

    def add(self, tokens_C: np.ndarray) -> None:
        """Counts in the next C tokens of the text, including 4-grams that span the previous chunk."""
        tokens = np.concatenate([self._tail, tokens_C.astype(np.int64)])
        self._tail = tokens[max(len(tokens) - CONTEXT + 1, 0) :]
        if len(tokens) < CONTEXT or not len(self._keys_U):
            return
        places, is_known = _look_up(self._pairs, tokens[:-1] * self._vocab_size + tokens[1:])
        both = is_known[:-2] & is_known[2:]
        places, is_known = _look_up(self._keys_U, places[:-2][both] * len(self._pairs) + places[2:][both])
        self._counts_U += np.bincount(places[is_known], minlength=len(self._keys_U))

    def counts(self) -> np.ndarray:
        """Occurrences so far of each given 4-gram, int64 [N]."""
        return self._counts_U[self._inverse_N]


def _look_up(sorted_U: np.ndarray, values_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(index in the sorted array, whether the value is present), both [C]."""
    places_C = np.minimum(np.searchsorted(sorted_U, values_C), len(sorted_U) - 1)
    return places_C, sorted_U[places_C] == values_C


def gains_by(
    values_N: np.ndarray,
    edges: Sequence[float],
    base_N: np.ndarray,
    systems: Mapping[str, np.ndarray],
    clusters_N: np.ndarray,
    *,
    confidence: float,
) -> list[dict]:
    """Gains over the base in each bin of positions.

    Args:
      values_N: the value of each position by which it is grouped.
      edges: lower edges of the bins, ascending; the first must not exceed the smallest value.
      base_N: log p_base(next token), in nats.
      systems: name -> log p(next token).
      clusters_N: int, the cluster of each position; see `intervals`.
      confidence: confidence level of the intervals.

    Returns:
      For each nonempty bin: from and below (None: unbounded), positions, share_of_positions, base (mean negative
      log-likelihood of the base, nats per token), and per system gain (mean log p_system - log p_base, nats per token),
      interval ([low, high] of the gain; None for a single cluster) and share_of_gain (share of the system's total gain;
      None if the total is not a gain).
    """
    bins_N = np.searchsorted(edges, values_N, side="right") - 1
    gains = {name: np.asarray(scores_N, np.float64) - base_N for name, scores_N in systems.items()}
    rows = []
    for index in np.unique(bins_N):
        chosen_N = bins_N == index
        upper = edges[index + 1] if index + 1 < len(edges) else None
        row = {"from": edges[index], "below": upper, "positions": int(chosen_N.sum())}
        row["share_of_positions"] = float(chosen_N.mean())
        row["base"] = float(-np.mean(base_N[chosen_N], dtype=np.float64))
        _, clusters = np.unique(clusters_N[chosen_N], return_inverse=True)
        row["gain"] = {name: float(gains_N[chosen_N].mean()) for name, gains_N in gains.items()}
        row["interval"] = {
            name: mean_interval(gains_N[chosen_N], clusters, confidence=confidence) if clusters.max() else None
            for name, gains_N in gains.items()
        }
        row["share_of_gain"] = {
            name: float(gains_N[chosen_N].sum() / gains_N.sum()) if gains_N.sum() > 0 else None
            for name, gains_N in gains.items()
        }
        rows.append(row)
    return rows
