"""The temperature of p_kNN, chosen by the likelihood of the kNN-LM mixture on held-out text."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.optimize

from mlpmem_jax.models.interpolation import tune_weight
from mlpmem_jax.retrieval.distribution import neighbor_weights

_OCTAVES = np.arange(-8.0, 5.0)  # of the grid: log2 of multiples of the median distance
_TOLERANCE = 0.01  # in log2(temperature)
_USEFUL_SHARE = 0.5  # of the best temperature's gain, in nats; below this the user is told


@dataclasses.dataclass(frozen=True)
class Choice:
    """A temperature in squared-L2 units, its best weight of p_kNN, and the mixture's perplexity."""

    temperature: float
    interpolation_weight: float
    perplexity: float


def label_log_probabilities(distances_QxK, is_label_QxK, temperature: float) -> np.ndarray:
    """log p_kNN(next token), float64 [Q]; -inf if no neighbor has that token.

    Args:
      distances_QxK: squared L2 distances, infinite where a neighbor is missing.
      is_label_QxK: whether the neighbor is followed by the same token as the query.
      temperature: T, in units of squared distance.
    """
    weights_QxK = neighbor_weights(distances_QxK, temperature)
    total_Q = weights_QxK.sum(axis=1, dtype=np.float64)
    label_Q = np.where(is_label_QxK, weights_QxK, 0).sum(axis=1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.log(label_Q / np.where(total_Q > 0, total_Q, 1))


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Held-out positions with their neighbors, on which temperatures are compared.

    Attributes:
      distances_QxK: squared L2 distances, infinite where a neighbor is missing.
      is_label_QxK: whether the neighbor is followed by the same token as the position.
      base_log_probabilities_Q: log p_LM of the position's next token.
    """

    distances_QxK: np.ndarray
    is_label_QxK: np.ndarray
    base_log_probabilities_Q: np.ndarray

    @property
    def base_perplexity(self) -> float:
        """Perplexity of the base alone."""
        return float(np.exp(-self.base_log_probabilities_Q.mean(dtype=np.float64)))

    def mixture(self, temperature: float) -> Choice:
        """The mixture lambda * p_kNN + (1 - lambda) * p_LM at a temperature, with the best lambda."""
        log_probabilities_Q = label_log_probabilities(self.distances_QxK, self.is_label_QxK, temperature)
        return Choice(temperature, *tune_weight(self.base_log_probabilities_Q, log_probabilities_Q))

    def best(self) -> Choice:
        """The temperature that minimizes the mixture's perplexity.

        Searches a grid in octaves around the median distance, then between the neighbors of its best point.
        """
        median = float(np.median(self.distances_QxK[np.isfinite(self.distances_QxK)]))
        median = median if median > 0 else 1.0

        def loss(log2_multiple: float) -> float:
            return math.log(self.mixture(float(median * 2.0**log2_multiple)).perplexity)

        losses = [loss(octave) for octave in _OCTAVES]
        place = int(np.argmin(losses))
        bounds = _OCTAVES[max(place - 1, 0)], _OCTAVES[min(place + 1, len(_OCTAVES) - 1)]
        refined = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": _TOLERANCE})
        octave = refined.x if refined.fun <= losses[place] else _OCTAVES[place]
        return self.mixture(float(median * 2.0**octave))


def compared(given: Choice, best: Choice, base_perplexity: float) -> str:
    """A sentence or two that compares the config's temperature with the best one."""
    text = (
        f"perplexity of the base with neighbors, on a sample of the validation split: {given.perplexity:.3f} at "
        f"config.targets.temperature {given.temperature:.4g}, {best.perplexity:.3f} at the best, {best.temperature:.4g}"
        f"; the base alone has {base_perplexity:.3f}"
    )
    gain, best_gain = (math.log(base_perplexity / choice.perplexity) for choice in (given, best))
    if gain < _USEFUL_SHARE * best_gain:
        text += (
            f". The configured temperature keeps {max(gain / best_gain, 0):.0%} of the neighbors' gain; set it to 0 "
            "to use the best one"
        )
    return text
