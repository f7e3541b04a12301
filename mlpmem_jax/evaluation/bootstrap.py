"""Paired bootstrap of perplexity ratios.

Two systems are scored on the same positions. Neighboring positions are not independent, so the unit that is drawn
with replacement is a block of consecutive positions (a sequence of the datastore), never a single one. All
systems are compared on the same draws.
"""

from __future__ import annotations

import numpy as np

DRAWS_AT_ONCE = 4_000_000  # 32 MB of indices


def ratio_intervals(
    reference_log_probabilities_UxT: np.ndarray,
    systems: dict[str, np.ndarray],
    *,
    samples: int,
    confidence: float,
    seed: int,
) -> dict[str, list[float]]:
    """Percentile intervals of perplexity(system) / perplexity(reference).

    The logarithm of that ratio is mean(log p_reference - log p_system), so only the means of these differences
    per block are resampled.

    Args:
      reference_log_probabilities_UxT: log-probabilities of the next tokens, U blocks of T positions each.
      systems: {name: log-probabilities of the same positions, [U, T]}.
      samples: number of bootstrap draws.
      confidence: probability content of the interval, for example 0.95.
      seed: of the draws; the same seed gives the same intervals.

    Returns:
      {name: [low, high]}, floats.

    Raises:
      ValueError: on fewer than two blocks, shapes that differ, or log-probabilities that are not finite.
    """
    reference_UxT = np.asarray(reference_log_probabilities_UxT, np.float64)
    if reference_UxT.ndim != 2 or len(reference_UxT) < 2:
        raise ValueError(f"a bootstrap needs at least two blocks, got shape {reference_UxT.shape}")
    differences_UxK = np.empty((len(reference_UxT), len(systems)))
    for column, (name, log_probabilities_UxT) in enumerate(systems.items()):
        system_UxT = np.asarray(log_probabilities_UxT, np.float64)
        if system_UxT.shape != reference_UxT.shape:
            raise ValueError(f"{name} scores {system_UxT.shape} positions, not {reference_UxT.shape}")
        differences_UxK[:, column] = np.mean(reference_UxT - system_UxT, axis=1)
    if not np.isfinite(differences_UxK).all():
        raise ValueError("a bootstrap needs finite log-probabilities; compare mixtures, not p_kNN alone")
    ratios_SxK = np.exp(resampled_means(differences_UxK, samples, seed))
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
        # How often each block was drawn, so that the sum is one matrix product.
        offsets_Sx1 = np.arange(len(draws_SxU))[:, None] * units
        counts_SxU = np.bincount((draws_SxU + offsets_Sx1).ravel(), minlength=draws_SxU.size)
        means.append(counts_SxU.reshape(draws_SxU.shape) @ values_UxK / units)
    return np.concatenate(means)
