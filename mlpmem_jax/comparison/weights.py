"""The interpolation weight of each question: tuned on other questions than the ones that are reported."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

GRID = np.round(np.linspace(0.0, 0.95, 20), 2)
"""Weights that are tried. 1 is not among them: a mixture of which the base is no part is not a mixture."""


def halves(count: int, seed: int) -> np.ndarray:
    """bool [count]: a random half of the questions."""
    return np.random.default_rng(seed).permutation(count) < count // 2


def best(values_GxN: np.ndarray, chosen_N: np.ndarray) -> int:
    """The index of the weight with the largest mean of a measure over the chosen questions; the smallest of equals."""
    return int(np.argmax(values_GxN[:, chosen_N].mean(axis=1)))


def tuned(values_GxN: np.ndarray, tuning_GxM: np.ndarray | None, seed: int) -> np.ndarray:
    """int [N]: for each question the index of its weight.

    Args:
      values_GxN: the measure that is maximized, at each weight, of the questions that are reported.
      tuning_GxM: the same of questions of a validation split; None = each half of the N is tuned on the other.
      seed: of the halves.
    """
    count = values_GxN.shape[1]
    if tuning_GxM is not None:
        return np.full(count, best(tuning_GxM, np.ones(tuning_GxM.shape[1], bool)))
    first_N = halves(count, seed)
    if not first_N.any() or first_N.all():
        return np.zeros(count, int)  # a single question has no other to be tuned on
    return np.where(first_N, best(values_GxN, ~first_N), best(values_GxN, first_N))


def over_grid(measure: Callable[[int, float], float], count: int, grid: Sequence[float] = GRID) -> np.ndarray:
    """float [G, N]: a measure of (question, weight) at every weight of the grid."""
    return np.array([[measure(question, weight) for question in range(count)] for weight in grid])
