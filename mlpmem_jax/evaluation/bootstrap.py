"""Paired bootstrap of perplexity ratios.

Two systems are scored on the same positions. Positions of one text are not independent: a memory that knows a document
gains on all of it. So the unit that is drawn with replacement is a document or a block of consecutive positions, never
a single position; all systems are compared on the same draws.
"""

from __future__ import annotations

import numpy as np

DRAWS_AT_ONCE = 4_000_000  # 32 MB of indices


def coarsest_units(documents_SxT: np.ndarray) -> tuple[str, np.ndarray]:
    """What to draw: documents or sequences, whichever are fewer, as long as there are two.

    Documents are the units where they are longer than sequences; where they are shorter (lines of one article, say)
    neighbors still belong together, and sequences are.

    Args:
      documents_SxT: document of every position of S sequences.

    Returns:
      ("document" or "sequence", int [S, T] unit of every position, counted from 0).
    """
    _, documents_N = np.unique(documents_SxT, return_inverse=True)
    if 2 <= documents_N.max() + 1 < len(documents_SxT):
        return "document", documents_N.reshape(documents_SxT.shape)
    return "sequence", np.broadcast_to(np.arange(len(documents_SxT))[:, None], documents_SxT.shape)


def ratio_intervals(
    reference_log_probabilities_N: np.ndarray,
    systems: dict[str, np.ndarray],
    units_N: np.ndarray,
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, list[float]]:
    """Percentile intervals of perplexity(system) / perplexity(reference).

    The logarithm of that ratio is mean(log p_reference - log p_system): of each unit the sum of these differences and
    the number of positions are resampled together.

    Args:
      reference_log_probabilities_N: log-probabilities of the next tokens, any shape.
      systems: {name: log-probabilities of the same positions}.
      units_N: unit of every position, whole numbers from 0 without gaps, as `coarsest_units` gives them.
      samples: number of bootstrap draws.
      confidence: probability content of the interval, for example 0.95.
      seed: of the draws; the same seed gives the same intervals.

    Returns:
      {name: [low, high]}, floats.

    Raises:
      ValueError: on fewer than two units, shapes that differ, or log-probabilities that are not finite.
    """
    reference_N = np.asarray(reference_log_probabilities_N, np.float64)
    counts_U = np.bincount(units_N.ravel())
    if len(counts_U) < 2:
        raise ValueError("a bootstrap needs at least two units to draw from")
    sums = [counts_U]
    for name, log_probabilities_N in systems.items():
        system_N = np.asarray(log_probabilities_N, np.float64)
        if system_N.shape != reference_N.shape:
            raise ValueError(f"{name} scores {system_N.shape} positions, not {reference_N.shape}")
        if not (np.isfinite(system_N).all() and np.isfinite(reference_N).all()):
            raise ValueError("a bootstrap needs finite log-probabilities; compare mixtures, not p_kNN alone")
        sums.append(np.bincount(units_N.ravel(), weights=(reference_N - system_N).ravel()))
    means_SxK = resampled_means(np.stack(sums, axis=1).astype(np.float64), samples, seed)
    ratios_SxK = np.exp(means_SxK[:, 1:] / means_SxK[:, :1])
    tail = (1.0 - confidence) / 2.0
    bounds_2xK = np.quantile(ratios_SxK, [tail, 1.0 - tail], axis=0)
    return {name: bounds_2xK[:, column].tolist() for column, name in enumerate(systems)}


def resampled_means(values_UxK: np.ndarray, samples: int, seed: int) -> np.ndarray:
    """Means over U rows drawn with replacement, float64 [samples, K]; every column sees the same draws."""
    generator = np.random.default_rng(seed)
    units = len(values_UxK)
    at_once = max(1, DRAWS_AT_ONCE // units)
    means = []
    for first in range(0, samples, at_once):
        draws_SxU = generator.integers(units, size=(min(at_once, samples - first), units))
        # How often each unit was drawn, so that the sum is one matrix product.
        offsets_Sx1 = np.arange(len(draws_SxU))[:, None] * units
        counts_SxU = np.bincount((draws_SxU + offsets_Sx1).ravel(), minlength=draws_SxU.size)
        means.append(counts_SxU.reshape(draws_SxU.shape) @ values_UxK / units)
    return np.concatenate(means)
