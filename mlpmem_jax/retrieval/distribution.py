"""Converts neighbors to next-token distributions: the paper's equation of p_kNN, for many positions at once.

    p_kNN(y | c)  is proportional to  sum over neighbors i with next token y of exp(-d_i / T)

where d is the squared L2 distance between the key of neighbor i and the query and T is the temperature (the paper's
section on constructing the targets; arXiv 2508.01832).
"""

from __future__ import annotations

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class SparseDistributions:
    """Next-token distributions of Q positions, storing only tokens with nonzero probability.

    The entries of position q are `offsets[q]:offsets[q + 1]` of the flat arrays, most probable first;
    ties are ordered by token id.

    Attributes:
      offsets_Q1: int64 [Q + 1].
      token_ids_M: int32 [M].
      probabilities_M: float32 [M]; the entries of one position sum to 1. A position without neighbors has none.
      label_probabilities_Q: float32 [Q], p_kNN(next token) before entries are dropped.
      dropped_mass_Q: float32 [Q], total probability of the dropped entries.
    """

    offsets_Q1: np.ndarray
    token_ids_M: np.ndarray
    probabilities_M: np.ndarray
    label_probabilities_Q: np.ndarray
    dropped_mass_Q: np.ndarray

    def rows(self) -> np.ndarray:
        """The position that each entry belongs to, int64 [M]."""
        return np.repeat(np.arange(len(self.offsets_Q1) - 1), np.diff(self.offsets_Q1))


def neighbor_weights(distances_QxK: np.ndarray, temperature: float) -> np.ndarray:
    """exp(-d / T) divided by the row's maximum, float32 [Q, K]; 0 where the distance is infinite."""
    nearest_Qx1 = distances_QxK.min(axis=1, keepdims=True)
    nearest_Qx1 = np.where(np.isfinite(nearest_Qx1), nearest_Qx1, 0)
    exponents_QxK = (nearest_Qx1 - distances_QxK).astype(np.float32, copy=False)
    # The exponent of the nearest neighbor is 0, however small the temperature is.
    with np.errstate(over="ignore"):
        exponents_QxK *= np.float32(min(1 / temperature, float(np.finfo(np.float32).max)))
    return np.exp(exponents_QxK, out=exponents_QxK)


def sparse_distributions(
    distances_QxK: np.ndarray,
    neighbor_tokens_QxK: np.ndarray,
    next_tokens_Q: np.ndarray,
    temperature: float,
    minimum_probability: float = 0.0,
    keep: int = 0,
) -> SparseDistributions:
    """p_kNN of each position from its neighbors, as sparse distributions.

    Args:
      distances_QxK: squared L2 distances, float; infinite where a neighbor is missing.
      neighbor_tokens_QxK: the token that follows each neighbor, int; any value where a neighbor is missing.
      next_tokens_Q: the token that follows each query, int.
      temperature: T > 0, in units of squared distance.
      minimum_probability: entries with at most this probability are dropped.
      keep: maximum number of entries to keep, the most probable ones; 0 keeps all.

    Returns:
      The distributions, renormalized to sum to 1 after entries are dropped.
    """
    weights_QxK = neighbor_weights(distances_QxK, temperature)
    # Packs token and weight into one integer for sorting: non-negative floats order like their bits.
    packed_QxK = np.left_shift(neighbor_tokens_QxK, 32, dtype=np.uint64, casting="unsafe")
    packed_QxK |= weights_QxK.view(np.uint32)
    packed_QxK.sort(axis=1)
    tokens_QxK = (packed_QxK >> np.uint64(32)).astype(np.int32)
    weights_QxK = packed_QxK.astype(np.uint32).view(np.float32)  # the low half

    first_QxK = np.ones(tokens_QxK.shape, bool)
    np.not_equal(tokens_QxK[:, 1:], tokens_QxK[:, :-1], out=first_QxK[:, 1:])
    starts_M = np.flatnonzero(first_QxK)
    token_ids_M = tokens_QxK.ravel()[starts_M]
    masses_M = np.add.reduceat(weights_QxK.ravel(), starts_M)
    counts_Q = np.count_nonzero(first_QxK, axis=1)
    rows_M = np.repeat(np.arange(len(counts_Q)), counts_Q)
    totals_Q = _row_sums(masses_M, rows_M, len(counts_Q))
    probabilities_M = masses_M / np.where(totals_Q > 0, totals_Q, 1)[rows_M]

    labels_Q = np.zeros(len(counts_Q), np.float32)
    is_label_M = token_ids_M == next_tokens_Q[rows_M]
    labels_Q[rows_M[is_label_M]] = probabilities_M[is_label_M]
    return _trimmed(rows_M, token_ids_M, probabilities_M.astype(np.float32), labels_Q, minimum_probability, keep)


def _row_sums(values_M: np.ndarray, rows_M: np.ndarray, count: int) -> np.ndarray:
    return np.bincount(rows_M, weights=values_M, minlength=count)  # accumulates in float64


def _trimmed(
    rows_M, token_ids_M, probabilities_M, labels_Q, minimum_probability: float, keep: int
) -> SparseDistributions:
    """Orders the entries of each row by descending probability, and drops the least probable."""
    kept_M = probabilities_M > minimum_probability
    rows_M, token_ids_M, probabilities_M = rows_M[kept_M], token_ids_M[kept_M], probabilities_M[kept_M]
    counts_Q = np.bincount(rows_M, minlength=len(labels_Q))
    columns_M = _columns(rows_M, counts_Q)
    # Pads the rows to a rectangle, so that one call sorts them all: by descending probability, then by token id.
    descending_M = ~probabilities_M.view(np.uint32)
    packed_M = np.left_shift(descending_M, 32, dtype=np.uint64) | token_ids_M.astype(np.uint32)
    packed_QxE = np.full((len(counts_Q), counts_Q.max(initial=0)), np.iinfo(np.uint64).max)
    packed_QxE[rows_M, columns_M] = packed_M
    packed_QxE.sort(axis=1)
    if keep:
        packed_QxE = packed_QxE[:, :keep]
        counts_Q = np.minimum(counts_Q, keep)
    packed_M = packed_QxE[np.arange(packed_QxE.shape[1]) < counts_Q[:, None]]

    token_ids_M = packed_M.astype(np.uint32).view(np.int32)
    probabilities_M = (~(packed_M >> np.uint64(32)).astype(np.uint32)).view(np.float32)
    rows_M = np.repeat(np.arange(len(counts_Q)), counts_Q)
    kept_mass_Q = _row_sums(probabilities_M, rows_M, len(counts_Q))
    return SparseDistributions(
        offsets_Q1=np.concatenate([[0], np.cumsum(counts_Q)]),
        token_ids_M=token_ids_M,
        probabilities_M=(probabilities_M / kept_mass_Q[rows_M]).astype(np.float32),
        label_probabilities_Q=labels_Q,
        dropped_mass_Q=np.where(counts_Q > 0, np.maximum(1 - kept_mass_Q, 0), 0).astype(np.float32),
    )


def _columns(rows_M: np.ndarray, counts_Q: np.ndarray) -> np.ndarray:
    starts_Q = np.cumsum(counts_Q) - counts_Q
    return np.arange(len(rows_M)) - starts_Q[rows_M]


def total_variation(left: SparseDistributions, right: SparseDistributions) -> np.ndarray:
    """The total variation distance of two distributions at each of the same positions, float64 [Q]."""
    count = len(left.offsets_Q1) - 1
    rows_M = np.concatenate([left.rows(), right.rows()])
    tokens_M = np.concatenate([left.token_ids_M, right.token_ids_M])
    signed_M = np.concatenate([left.probabilities_M, -right.probabilities_M])
    cells_M = rows_M * (np.int64(tokens_M.max(initial=0)) + 1) + tokens_M
    _, inverse_M = np.unique(cells_M, return_inverse=True)
    differences = np.abs(np.bincount(inverse_M, weights=signed_M))
    cell_rows = np.zeros(len(differences), np.int64)
    cell_rows[inverse_M] = rows_M
    return 0.5 * np.bincount(cell_rows, weights=differences, minlength=count)
