"""The interpolation weight of each question, always tuned on other questions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

GRID = np.round(np.linspace(0.0, 0.95, 20), 2)
"""The weights to try. 1 is excluded: the base would have no part in the mixture."""


def halves(count: int, seed: int) -> np.ndarray:
    """bool [count]: a random half of the questions."""
    return np.random.default_rng(seed).permutation(count) < count // 2


def best(values_ZxN: np.ndarray, chosen_N: np.ndarray) -> int:
    """The index of the weight with the largest mean metric over the chosen questions; ties go to the smallest."""
    return int(np.argmax(values_ZxN[:, chosen_N].mean(axis=1)))


def tuned(values_ZxN: np.ndarray, tuning_values: np.ndarray | None, seed: int) -> np.ndarray:
    """int [N]: the index of each question's weight.

    Args:
      values_ZxN: the metric to maximize, at each weight, for the reported questions.
      tuning_values: the same for questions of a validation split, [Z, questions]; None = each half of the N is tuned on
        the other.
      seed: random seed of the split into halves.
    """
    count = values_ZxN.shape[1]
    if tuning_values is not None:
        return np.full(count, best(tuning_values, np.ones(tuning_values.shape[1], bool)))
    first_N = halves(count, seed)
    if not first_N.any() or first_N.all():
        return np.zeros(count, int)  # a single question cannot be tuned on others
    return np.where(first_N, best(values_ZxN, ~first_N), best(values_ZxN, first_N))


def over_grid(measure: Callable[[int, float], float], count: int, grid: Sequence[float]) -> np.ndarray:
    """float [Z, N]: a metric of (question, weight) at every weight of the grid."""
    return np.array([[measure(question, weight) for question in range(count)] for weight in grid])
