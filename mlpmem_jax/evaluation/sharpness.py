"""How sharp next-token distributions are: the paper's table "Shape of the distributions".

Two counts per position, averaged: tokens with a probability above each threshold, and the fewest tokens that
together hold a given share of the mass.
"""

from __future__ import annotations

import numpy as np

THRESHOLDS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
MASSES = (0.80, 0.90, 0.95, 0.99)


class SharpnessMean:
    """Running mean of the counts over chunks of positions.

    Attributes:
      positions: number of positions added.
    """

    def __init__(self) -> None:
        self.positions = 0
        self._sums = np.zeros(len(THRESHOLDS) + len(MASSES))

    def add(self, probabilities_NxE: np.ndarray) -> None:
        """Adds N distributions; see `tokens_above` for the layout of a row."""
        counts = np.concatenate([tokens_above(probabilities_NxE), tokens_for_mass(probabilities_NxE)], axis=1)
        self._sums += counts.sum(axis=0)
        self.positions += len(counts)

    def summary(self) -> dict:
        """{'tokens_above': {threshold: mean}, 'tokens_for_mass': {mass: mean}, 'positions': N}, string keys."""
        means = (self._sums / self.positions).tolist()
        above, for_mass = means[: len(THRESHOLDS)], means[len(THRESHOLDS) :]
        return {
            "tokens_above": {f"{t:g}": mean for t, mean in zip(THRESHOLDS, above, strict=True)},
            "tokens_for_mass": {f"{m:g}": mean for m, mean in zip(MASSES, for_mass, strict=True)},
            "positions": self.positions,
        }


def tokens_above(probabilities_NxE: np.ndarray) -> np.ndarray:
    """Number of tokens whose probability is strictly above each of THRESHOLDS, int64 [N, 7].

    Args:
      probabilities_NxE: one distribution per row; E is the vocabulary, or for sparse distributions the most
        entries of a row, with shorter rows padded by zeros.
    """
    probabilities_NxE = np.asarray(probabilities_NxE)
    return np.stack([(probabilities_NxE > threshold).sum(axis=1) for threshold in THRESHOLDS], axis=1)


def tokens_for_mass(probabilities_NxE: np.ndarray) -> np.ndarray:
    """Fewest tokens that hold each of MASSES of a row's total, int64 [N, 4]; rows as in `tokens_above`.

    Shares are of the row's own total: a distribution stored in float16 does not sum to one exactly. A row of
    zeros needs no tokens.
    """
    # Negated, so that the largest come first; the shares are positive again.
    cumulated_NxE = np.cumsum(np.sort(-np.asarray(probabilities_NxE), axis=1), axis=1, dtype=np.float64)
    totals_Nx1 = cumulated_NxE[:, -1:]
    shares_NxE = cumulated_NxE / np.where(totals_Nx1 < 0, totals_Nx1, 1.0)
    # The last share is 1 up to rounding, so the count is limited to the tokens that the row has.
    counts_Nx4 = np.stack([np.searchsorted(shares_E, np.array(MASSES) - 1e-12) + 1 for shares_E in shares_NxE])
    return np.where(totals_Nx1 < 0, np.minimum(counts_Nx4, shares_NxE.shape[1]), 0)


def rows_of_ragged(values_M: np.ndarray, offsets_N1: np.ndarray) -> np.ndarray:
    """Converts ragged entries to zero-padded rows.

    Args:
      values_M: entries of N positions, concatenated.
      offsets_N1: int [N + 1], start of each position's entries in values_M, relative to its first.

    Returns:
      [N, most entries of a position], dtype of values_M.
    """
    lengths_N = np.diff(offsets_N1)
    rows_NxE = np.zeros((len(lengths_N), max(int(lengths_N.max(initial=0)), 1)), np.asarray(values_M).dtype)
    rows_NxE[np.arange(rows_NxE.shape[1]) < lengths_N[:, None]] = values_M
    return rows_NxE
