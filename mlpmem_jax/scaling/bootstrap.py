"""Confidence intervals for fits to a few points: a studentized parametric bootstrap.

Resampling a handful of points with replacement badly understates the uncertainty: samples of five points repeat
points, and their scatter around a fit is smaller than the true noise. Instead, whole sweeps are simulated from the
fitted law. The noise is normal on log perplexity, one value per size, so that seeds of one size, whose deviations are
correlated, are never counted as independent sizes. Its scale is not assumed known: each replicate draws its own from
the chi-square distribution that the scatter around the fit follows. Every replicate is refitted, and percentiles are
taken. For a coefficient of a straight line this gives Student's t interval, which is exact for any number of points;
other quantities (beta, ratios, optima, Chinchilla's coefficients) are computed on the same replicates.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

ROUNDING = 1e-12  # of float64 logarithms after several operations: no fit is more precise than this


def generator_of(seed: int, *names: str) -> np.random.Generator:
    """An independent random stream for each quantity, unaffected by which others are computed."""
    return np.random.default_rng([seed, *(int.from_bytes(name.encode(), "big") for name in names)])


def noise(
    scatter: float, degrees_of_freedom: int, shape: tuple[int, int], generator: np.random.Generator
) -> np.ndarray:
    """Noise of simulated sweeps, float64 [S, U]; each row draws its own scale."""
    scales_Sx1 = scatter * np.sqrt(degrees_of_freedom / generator.chisquare(degrees_of_freedom, (shape[0], 1)))
    return scales_Sx1 * generator.standard_normal(shape)


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """A linear fit and its bootstrap replicates.

    Attributes:
      coefficients_K: the fitted coefficients.
      replicates_SxK: coefficients of the simulated sweeps; None if there are no degrees of freedom left.
      residuals_U: observed minus fitted.
      scatter: standard deviation around the fit, corrected for the K coefficients; None in the same case.
      covariance_KxK: covariance of the coefficients; None in the same case.
      degrees_of_freedom: U - K.
    """

    coefficients_K: np.ndarray
    replicates_SxK: np.ndarray | None
    residuals_U: np.ndarray
    scatter: float | None
    covariance_KxK: np.ndarray | None
    degrees_of_freedom: int


def least_squares(
    design_UxK: np.ndarray, observed_U: np.ndarray, samples: int, generator: np.random.Generator
) -> LeastSquares:
    """Fits observed = design @ coefficients with equal weights, and draws `samples` bootstrap replicates."""
    inverse_KxU = np.linalg.pinv(design_UxK)
    coefficients_K = inverse_KxU @ observed_U
    residuals_U = observed_U - design_UxK @ coefficients_K
    degrees_of_freedom = len(observed_U) - design_UxK.shape[1]
    if degrees_of_freedom < 1:
        return LeastSquares(coefficients_K, None, residuals_U, None, None, degrees_of_freedom)
    scatter = max(math.sqrt(float(residuals_U @ residuals_U) / degrees_of_freedom), ROUNDING)
    replicates_SxK = (
        coefficients_K + noise(scatter, degrees_of_freedom, (samples, len(observed_U)), generator) @ inverse_KxU.T
    )
    covariance_KxK = scatter**2 * inverse_KxU @ inverse_KxU.T
    return LeastSquares(coefficients_K, replicates_SxK, residuals_U, scatter, covariance_KxK, degrees_of_freedom)


def interval(value: float, draws_S: np.ndarray | None, confidence: float) -> dict[str, float | None]:
    """{value, low, high}; a bound is None if it cannot be computed or is infinite.

    Replicates may be infinite (a diverging coefficient) or NaN (an optimum that does not exist). NaNs count against
    both bounds.
    """
    if draws_S is None:
        return {"value": finite(value), "low": None, "high": None}
    tail = (1.0 - confidence) / 2.0
    downward_S, upward_S = (np.where(np.isnan(draws_S), end, draws_S) for end in (-np.inf, np.inf))
    # Picks an actual replicate rather than interpolating between two, one of which may be infinite.
    low = np.quantile(downward_S, tail, method="inverted_cdf")
    high = np.quantile(upward_S, 1.0 - tail, method="inverted_cdf")
    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """The value, or None where JSON cannot represent it."""
    return float(value) if math.isfinite(value) else None
