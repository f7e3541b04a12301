"""The temperature of p_kNN, chosen by the likelihood of the kNN-LM mixture on held-out text."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.optimize

from mlpmem_jax.models.interpolation import tune_weight
from mlpmem_jax.retrieval.distribution import neighbor_weights

_GRID = 2.0 ** np.arange(-8, 5)  # multiples of the median distance
_TOLERANCE = 0.01  # of log2(temperature)


@dataclasses.dataclass(frozen=True)
class Choice:
    """A temperature in squared-L2 units, the weight of p_kNN that suits it best, and the mixture's perplexity."""

    temperature: float
    interpolation_weight: float
    perplexity: float


def label_log_probabilities(distances_QxK, is_label_QxK, temperature: float) -> np.ndarray:
    """log p_kNN(next token), float64 [Q]; -inf where no neighbor has that token.

    Args:
      distances_QxK: squared L2 distances, infinite where there is no neighbor.
      is_label_QxK: whether the neighbor was followed by the token that followed the query.
      temperature: T, in units of squared distance.
    """
    weights_QxK = neighbor_weights(distances_QxK, temperature)
    total_Q = weights_QxK.sum(axis=1, dtype=np.float64)
    label_Q = np.where(is_label_QxK, weights_QxK, 0).sum(axis=1, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return np.log(label_Q / np.where(total_Q > 0, total_Q, 1))


def choose(distances_QxK, neighbor_tokens_QxK, next_tokens_Q, base_log_probabilities_Q) -> Choice:
    """The temperature at which lambda * p_kNN + (1 - lambda) * p_LM, with the best lambda, is likeliest.

    A grid in octaves around the median distance, then a golden-section search between the neighbors of its best point.

    Args:
      distances_QxK: squared L2 distances of held-out positions to their neighbors.
      neighbor_tokens_QxK: the token that followed each neighbor.
      next_tokens_Q: the token that followed each position.
      base_log_probabilities_Q: log p_LM of that token.
    """
    is_label_QxK = neighbor_tokens_QxK == next_tokens_Q[:, None]
    median = float(np.median(distances_QxK[np.isfinite(distances_QxK)]))
    median = median if median > 0 else 1.0

    def mixture(log2_multiple: float) -> Choice:
        temperature = float(median * 2.0**log2_multiple)
        log_probabilities_Q = label_log_probabilities(distances_QxK, is_label_QxK, temperature)
        return Choice(temperature, *tune_weight(base_log_probabilities_Q, log_probabilities_Q))

    octaves = np.log2(_GRID)
    losses = [math.log(mixture(octave).perplexity) for octave in octaves]
    best = int(np.argmin(losses))
    bounds = octaves[max(best - 1, 0)], octaves[min(best + 1, len(octaves) - 1)]
    found = scipy.optimize.minimize_scalar(
        lambda octave: math.log(mixture(octave).perplexity),
        bounds=bounds,
        method="bounded",
        options={"xatol": _TOLERANCE},
    )
    return mixture(found.x if found.fun <= losses[best] else octaves[best])
