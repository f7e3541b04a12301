"""L(N, D) = E + A / N^a + B / D^b, the law of Hoffmann et al., "Training Compute-Optimal Large Language Models"
(arXiv 2203.15556, section 3.3), fitted as they do: Huber loss with delta 1e-3 on log L, L-BFGS from many starts.

L is log perplexity in nats per token, N parameters, D training tokens. At compute C = kappa N D the best size
grows as C^(b / (a + b)) and the best number of tokens as C^(a / (a + b)).
"""

from __future__ import annotations

import itertools

import numpy as np
import scipy.optimize
import scipy.special

from mlpmem_jax.scaling import bootstrap
from mlpmem_jax.scaling.points import Runs, set_of
from mlpmem_jax.scaling.power_law import with_errors

DELTA = 1e-3
_PRECISION = 1e-9  # of log L at the solver's optimum: no fit is more precise than this
COEFFICIENTS = ("E", "A", "B", "a", "b")
_LEAST_RUNS = 7  # two more than there are coefficients
_LEAST_SPREAD = 0.1  # standard deviation of log tokens around a smooth function of size
_REFITS = 500
_START_EXPONENTS, _START_FLOORS = (0.15, 0.5, 1.0), (0.2, 0.5, 0.8)
_BOUNDS = [(-14.0, 4.0)] * 3 + [(1e-3, 4.0)] * 2  # search bounds: logarithms of terms, then exponents
_STEPS = 100
_OPTIONS = {"maxiter": 5000, "maxfun": 20000, "ftol": 1e-15, "gtol": 1e-9, "maxcor": 20}


def absent(runs: Runs) -> str | None:
    """Why these runs cannot identify the five coefficients; None if they can."""
    if np.min(runs.losses_R) <= 0.0:
        return "log L needs perplexities above 1"
    sizes, tokens = len(set_of(runs.parameters_R)), len(set_of(runs.tokens_R))
    if len(runs) < _LEAST_RUNS or sizes < 3 or tokens < 3:
        return (
            f"five coefficients need at least {_LEAST_RUNS} runs over 3 sizes and 3 numbers of tokens; "
            f"found {len(runs)} runs, {sizes} sizes, {tokens} numbers of tokens"
        )
    log_sizes_R, log_tokens_R = np.log(runs.parameters_R), np.log(runs.tokens_R)
    curve_3 = np.polyfit(log_sizes_R - log_sizes_R.mean(), log_tokens_R, 2)
    apart_R = log_tokens_R - np.polyval(curve_3, log_sizes_R - log_sizes_R.mean())
    if np.std(apart_R) < _LEAST_SPREAD:
        return "in these runs size determines the number of tokens: train each size on several numbers of tokens"
    return None


def fit(runs: Runs, *, confidence: float, samples: int, generator: np.random.Generator) -> dict:
    """Fits the law to the runs of one arm.

    Args:
      runs: runs for which `absent` returns None.
      confidence: confidence level of the intervals.
      samples: bootstrap replicates for the intervals; at most 500 are refitted.
      generator: random generator for the replicates.

    Returns:
      {value, low, high} for E, A, B, a, b and for the exponents optimal_parameters and optimal_tokens in
      compute; goodness of fit, and errors of predicting each run from the others. Serializable as JSON.
    """
    points = _Points(runs)
    fitted_5 = points.fit(np.log(runs.losses_R))
    residuals_R = np.log(runs.losses_R) - points.log_losses(fitted_5)
    degrees_of_freedom = len(runs) - len(COEFFICIENTS)
    scatter = max(float(np.sqrt(residuals_R @ residuals_R / degrees_of_freedom)), _PRECISION)
    noise_BxR = bootstrap.noise(scatter, degrees_of_freedom, (min(samples, _REFITS), len(runs)), generator)
    drawn_Bx5 = points.refit(points.log_losses(fitted_5) + noise_BxR, np.ones_like(noise_BxR), fitted_5)
    values, of_replicates = points.coefficients(fitted_5), points.coefficients(drawn_Bx5)
    return {
        **{name: bootstrap.interval(values[name], of_replicates[name], confidence) for name in values},
        "goodness": _goodness(runs, residuals_R, scatter),
        "leave_one_out": _leave_one_out(runs, fitted_5),
        "refits": len(drawn_Bx5),
    }


class _Points:
    """Objective and solver for one set of runs.

    The search parameters are (log E, log A', log B', a, b), where A' and B' are the terms at the runs' mean log N and
    log D: centered this way they hardly depend on the exponents, and every start reaches the same optimum.
    """

    def __init__(self, runs: Runs):
        log_2xR = np.log([runs.parameters_R, runs.tokens_R])
        self._centers_2 = log_2xR.mean(axis=1)
        self._sizes_R, self._tokens_R = log_2xR - self._centers_2[:, None]

    def _linearized(self, search: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """log L of the runs under the law, [..., R], and its derivatives by the parameters, [..., R, 5]."""
        log_e, log_a, log_b, a, b = np.moveaxis(search, -1, 0)[..., None]
        logarithms = np.broadcast_arrays(log_e, log_a - a * self._sizes_R, log_b - b * self._tokens_R)
        terms = np.exp(np.stack(logarithms, axis=-1))
        losses = np.sum(terms, axis=-1)
        shares = terms / losses[..., None]
        by_exponents = -shares[..., 1:] * np.stack([self._sizes_R, self._tokens_R], axis=-1)
        return np.log(losses), np.concatenate([shares, by_exponents], axis=-1)

    def log_losses(self, search: np.ndarray) -> np.ndarray:
        """log L of the runs under the law, [..., R]."""
        return self._linearized(search)[0]

    def _huber(self, search: np.ndarray, observed: np.ndarray, counted: np.ndarray) -> np.ndarray:
        """Sum over the counted runs of Huber losses, in units of delta squared."""
        residuals = (self.log_losses(search) - observed) / DELTA
        return np.sum(counted * scipy.special.huber(1.0, residuals), axis=-1)

    def objective(self, search_5: np.ndarray, observed_R: np.ndarray) -> tuple[float, np.ndarray]:
        """The sum of Huber losses and its gradient."""
        log_losses_R, slopes_Rx5 = self._linearized(search_5)
        residuals_R = (log_losses_R - observed_R) / DELTA
        value = float(np.sum(scipy.special.huber(1.0, residuals_R)))
        return value, np.clip(residuals_R, -1.0, 1.0) @ slopes_Rx5 / DELTA

    def fit(self, observed_R: np.ndarray) -> np.ndarray:
        """The best optimum from a grid of starting points."""
        level, starts = float(np.log(np.mean(np.exp(observed_R)))), []
        for a, b, floor in itertools.product(_START_EXPONENTS, _START_EXPONENTS, _START_FLOORS):
            term = level + np.log((1.0 - floor) / 2.0)
            starts.append(np.array([level + np.log(floor), term, term, a, b]))
        return min((self._minimize(observed_R, start_5) for start_5 in starts), key=lambda optimum: optimum.fun).x

    def _minimize(self, observed_R: np.ndarray, start_5: np.ndarray) -> scipy.optimize.OptimizeResult:
        return scipy.optimize.minimize(
            self.objective,
            start_5,
            args=(observed_R,),
            jac=True,
            method="L-BFGS-B",
            bounds=_BOUNDS,
            options=_OPTIONS,
        )

    def refit(self, observed_BxR: np.ndarray, counted_BxR: np.ndarray, start_5: np.ndarray) -> np.ndarray:
        """Optima for B sets of losses at once, each near `start_5`; runs where `counted` is 0 are left out.

        Takes Levenberg-Marquardt steps with Huber weights, whose quadratic majorizes the loss at the current point.
        """
        search_Bx5, damping_B = np.tile(start_5, (len(observed_BxR), 1)), np.full(len(observed_BxR), 1e-3)
        lowest_5, highest_5 = np.array(_BOUNDS).T
        loss_B = self._huber(search_Bx5, observed_BxR, counted_BxR)
        for _ in range(_STEPS):
            log_losses_BxR, slopes_BxRx5 = self._linearized(search_Bx5)
            residuals_BxR = (log_losses_BxR - observed_BxR) / DELTA
            weighted_BxRx5 = (counted_BxR / np.maximum(np.abs(residuals_BxR), 1.0))[..., None] * slopes_BxRx5
            normal_Bx5x5 = weighted_BxRx5.mT @ slopes_BxRx5
            damped = damping_B[:, None] * np.diagonal(normal_Bx5x5, axis1=1, axis2=2) + 1e-12
            gradient_Bx5x1 = weighted_BxRx5.mT @ residuals_BxR[..., None] * DELTA
            step_Bx5 = np.linalg.solve(normal_Bx5x5 + damped[:, None, :] * np.eye(5), gradient_Bx5x1)[..., 0]
            tried_Bx5 = np.clip(search_Bx5 - step_Bx5, lowest_5, highest_5)
            tried_loss_B = self._huber(tried_Bx5, observed_BxR, counted_BxR)
            better_B = tried_loss_B < loss_B
            search_Bx5, loss_B = np.where(better_B[:, None], tried_Bx5, search_Bx5), np.minimum(tried_loss_B, loss_B)
            damping_B = np.clip(np.where(better_B, damping_B / 4, damping_B * 4), 1e-12, 1e6)
        return search_Bx5

    def coefficients(self, search: np.ndarray) -> dict[str, np.ndarray]:
        """Converts search parameters [..., 5] to the law's coefficients and the exponents of the optimum."""
        log_e, log_a, log_b, a, b = np.moveaxis(search, -1, 0)
        with np.errstate(over="ignore"):
            terms = np.exp(log_e), np.exp(log_a + a * self._centers_2[0]), np.exp(log_b + b * self._centers_2[1])
        optima = {"optimal_parameters": b / (a + b), "optimal_tokens": a / (a + b)}
        return dict(zip(COEFFICIENTS, (*terms, a, b), strict=True)) | optima


def _goodness(runs: Runs, residuals_R: np.ndarray, scatter: float) -> dict:
    """Goodness of fit; `scatter` is the standard deviation of log L around the law."""
    observed_R = np.log(runs.losses_R)
    total = float(np.sum(np.square(observed_R - observed_R.mean())))
    return {
        "r_squared": 1.0 - float(residuals_R @ residuals_R) / total if total > 0.0 else None,
        "scatter": scatter,
        "degrees_of_freedom": len(runs) - len(COEFFICIENTS),
    }


def _leave_one_out(runs: Runs, fitted_5: np.ndarray) -> dict:
    """Each run's perplexity predicted by a law fitted to the others."""
    points, observed_R = _Points(runs), np.log(runs.losses_R)
    refitted_Rx5 = points.refit(np.tile(observed_R, (len(runs), 1)), 1.0 - np.eye(len(runs)), fitted_5)
    predicted_R = np.exp(np.exp(np.diagonal(points.log_losses(refitted_Rx5))))
    columns = zip(runs.parameters_R, runs.tokens_R, np.exp(runs.losses_R), predicted_R, strict=True)
    names = ("parameters", "tokens", "observed", "predicted")
    return with_errors([dict(zip(names, map(float, row), strict=True)) for row in columns])
