"""Interpolation of two next-token distributions: p = lambda * p_other + (1 - lambda) * p_base.

This is the inference rule of the paper "MLP Memory" (arXiv 2508.01832), where `other` is the memory; with p_kNN instead
it is kNN-LM. Scoring a mixture needs only the probabilities of the actual next tokens, so everything here works on
arrays of N log-probabilities, in float64 on the host.
"""

from __future__ import annotations

import numpy as np
import scipy.optimize

GRID = np.linspace(0.0, 1.0, 21)
WEIGHT_TOLERANCE = 1e-6
LOSS_TOLERANCE = 1e-12  # nats per token: below the rounding of a mean of float64 logarithms


class NotANumber(ValueError):
    """Log-probabilities to score are NaN."""


def perplexity(log_probabilities_N: np.ndarray) -> float:
    """exp of the mean negative log-likelihood; inf if a token has probability zero.

    Args:
      log_probabilities_N: natural log-probabilities of the next tokens, any shape, -inf allowed.

    Raises:
      NotANumber: a value is NaN.
      ValueError: there are no positions, or a log-probability is above zero.
    """
    return float(np.exp(-np.mean(_checked(log_probabilities_N, "log-probabilities"))))


def mixture_log_probabilities(
    base_log_probabilities_N: np.ndarray, other_log_probabilities_N: np.ndarray, weight: float
) -> np.ndarray:
    """log(weight * p_other + (1 - weight) * p_base) per position, float64, without leaving the log domain.

    The weights 0 and 1 return the base and the other distribution exactly, even where the excluded one is 0.

    Args:
      base_log_probabilities_N: log p_base(next token), any shape.
      other_log_probabilities_N: log p_other(next token), same shape; -inf where that probability is 0.
      weight: the interpolation weight lambda, in [0, 1].

    Raises:
      ValueError: the weight is outside [0, 1], or shapes differ.
    """
    base_N = np.asarray(base_log_probabilities_N, np.float64)
    other_N = np.asarray(other_log_probabilities_N, np.float64)
    if base_N.shape != other_N.shape:
        raise ValueError(f"two distributions score different positions: {base_N.shape}, {other_N.shape}")
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"an interpolation weight must be in [0, 1], got {weight}")
    if weight == 0.0:
        return base_N
    if weight == 1.0:
        return other_N
    return np.logaddexp(other_N + np.log(weight), base_N + np.log1p(-weight))


def mixture_perplexity(
    base_log_probabilities_N: np.ndarray, other_log_probabilities_N: np.ndarray, weight: float
) -> float:
    """Perplexity of the mixture at one weight; arguments as in `mixture_log_probabilities`."""
    return perplexity(mixture_log_probabilities(base_log_probabilities_N, other_log_probabilities_N, weight))


def tune_weight(base_log_probabilities_N: np.ndarray, other_log_probabilities_N: np.ndarray) -> tuple[float, float]:
    """The weight with the lowest perplexity on these positions, to about 1e-6.

    The mean negative log-likelihood is convex in the weight, so the best point of a grid has the optimum between
    its two neighbors; a golden-section search (with scipy's parabolic steps) finds it there. Ties go to grid
    points, smaller ones first: a distribution that does not help gets exactly 0, one that replaces the base
    exactly 1.

    Args:
      base_log_probabilities_N: log p_base(next token) on the validation split, any shape.
      other_log_probabilities_N: log p_other(next token), same shape; -inf allowed.

    Returns:
      (weight, perplexity of the mixture at that weight), two floats.

    Raises:
      ValueError: as in `perplexity` and `mixture_log_probabilities`.
    """
    base_N = _checked(base_log_probabilities_N, "base log-probabilities")
    other_N = _checked(other_log_probabilities_N, "other log-probabilities")

    def loss(weight):
        return -np.mean(mixture_log_probabilities(base_N, other_N, weight))

    losses_Z = np.array([loss(weight) for weight in GRID])
    best = int(np.argmax(losses_Z <= losses_Z.min() + LOSS_TOLERANCE))
    bounds = GRID[max(best - 1, 0)], GRID[min(best + 1, len(GRID) - 1)]
    minimum = scipy.optimize.minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": WEIGHT_TOLERANCE})
    if losses_Z[best] <= minimum.fun + LOSS_TOLERANCE:
        return float(GRID[best]), float(np.exp(losses_Z[best]))
    return float(minimum.x), float(np.exp(minimum.fun))


def _checked(log_probabilities_N: np.ndarray, name: str) -> np.ndarray:
    values_N = np.asarray(log_probabilities_N, np.float64)
    if values_N.size == 0:
        raise ValueError(f"{name}: no positions to score")
    if np.isnan(values_N).any():
        raise NotANumber(f"{name}: {int(np.isnan(values_N).sum())} of {values_N.size} are NaN")
    # Float32 softmax and float16 storage may round a certain token to slightly above probability one.
    if values_N.max() > 1e-3:
        raise ValueError(f"{name}: found {values_N.max():.3g}, a log-probability is at most 0")
    return values_N
