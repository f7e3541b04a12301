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
    """Noise of simulated sweeps, float64 [B, R]; each row draws its own scale."""
    scales_Bx1 = scatter * np.sqrt(degrees_of_freedom / generator.chisquare(degrees_of_freedom, (shape[0], 1)))
    return scales_Bx1 * generator.standard_normal(shape)


@dataclasses.dataclass(frozen=True)
class LeastSquares:
    """A linear fit and its bootstrap replicates.

    Attributes:
      coefficients_I: the fitted coefficients.
      replicates_BxI: coefficients of the simulated sweeps; None if there are no degrees of freedom left.
      residuals_R: observed minus fitted.
      scatter: standard deviation around the fit, corrected for the I coefficients; None in the same case.
      covariance_IxI: covariance of the coefficients; None in the same case.
      degrees_of_freedom: R - I.
    """

    coefficients_I: np.ndarray
    replicates_BxI: np.ndarray | None
    residuals_R: np.ndarray
    scatter: float | None
    covariance_IxI: np.ndarray | None
    degrees_of_freedom: int


def least_squares(
    design_RxI: np.ndarray, observed_R: np.ndarray, samples: int, generator: np.random.Generator
) -> LeastSquares:
    """Fits observed = design @ coefficients with equal weights, and draws `samples` bootstrap replicates."""
    inverse_IxR = np.linalg.pinv(design_RxI)
    coefficients_I = inverse_IxR @ observed_R
    residuals_R = observed_R - design_RxI @ coefficients_I
    degrees_of_freedom = len(observed_R) - design_RxI.shape[1]
    if degrees_of_freedom < 1:
        return LeastSquares(coefficients_I, None, residuals_R, None, None, degrees_of_freedom)
    scatter = max(math.sqrt(float(residuals_R @ residuals_R) / degrees_of_freedom), ROUNDING)
    replicates_BxI = (
        coefficients_I + noise(scatter, degrees_of_freedom, (samples, len(observed_R)), generator) @ inverse_IxR.T
    )
    covariance_IxI = scatter**2 * inverse_IxR @ inverse_IxR.T
    return LeastSquares(coefficients_I, replicates_BxI, residuals_R, scatter, covariance_IxI, degrees_of_freedom)


def interval(value: float, draws_B: np.ndarray | None, confidence: float) -> dict[str, float | None]:
    """{value, low, high}; a bound is None if it cannot be computed or is infinite.

    Replicates may be infinite (a diverging coefficient) or NaN (an optimum that does not exist). NaNs count against
    both bounds.
    """
    if draws_B is None:
        return {"value": finite(value), "low": None, "high": None}
    tail = (1.0 - confidence) / 2.0
    downward_B, upward_B = (np.where(np.isnan(draws_B), end, draws_B) for end in (-np.inf, np.inf))
    # Picks an actual replicate rather than interpolating between two, one of which may be infinite.
    low = np.quantile(downward_B, tail, method="inverted_cdf")
    high = np.quantile(upward_B, 1.0 - tail, method="inverted_cdf")
    return {"value": finite(value), "low": finite(low), "high": finite(high)}


def finite(value: float) -> float | None:
    """The value, or None where JSON cannot represent it."""
    return float(value) if math.isfinite(value) else None
