"""PPL = (beta X)^gamma, the scaling law of the paper's figure 1, by least squares in logarithms.

X is the number of parameters or the training compute. With L = log PPL the law is the straight line
L = gamma log X + gamma log beta.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import scipy.special

from mlpmem_jax.scaling import bootstrap
from mlpmem_jax.scaling.points import Runs


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """A fitted law and its bootstrap replicates. The line is L = height + gamma (log X - center).

    Attributes:
      runs: the runs it was fitted to, one per X.
      x_R: X of each run.
      center: mean of log X.
      line: the fitted line; its coefficients are height and gamma.
    """

    runs: Runs
    x_R: np.ndarray
    center: float
    line: bootstrap.LeastSquares

    @property
    def gamma(self) -> float:
        return float(self.line.coefficients_I[1])

    @property
    def log_beta(self) -> float:
        return float(_log_beta(*self.line.coefficients_I, self.center, self.gamma))

    @property
    def log_betas_B(self) -> np.ndarray:
        heights_B, gammas_B = self.line.replicates_BxI.T
        return _log_beta(heights_B, gammas_B, self.center, self.gamma)

    def combination(self, weights_2: np.ndarray) -> tuple[float, float]:
        """The value and variance of a weighted sum of height and gamma."""
        return float(weights_2 @ self.line.coefficients_I), float(weights_2 @ self.line.covariance_IxI @ weights_2)

    def losses(self, x: float | np.ndarray) -> np.ndarray:
        """log PPL at x."""
        height, gamma = self.line.coefficients_I
        return height + gamma * (np.log(x) - self.center)

    def drawn_losses(self, x_Z: np.ndarray) -> np.ndarray:
        """log PPL at x for every replicate, [B, Z]."""
        heights_B, gammas_B = self.line.replicates_BxI.T
        return heights_B[:, None] + gammas_B[:, None] * (np.log(x_Z) - self.center)


def _log_beta(height, gamma, center: float, fitted_gamma: float):
    """log beta = intercept / gamma; a replicate whose gamma changes sign is beyond the pole of that quotient."""
    intercept = height - gamma * center
    with np.errstate(divide="ignore"):
        beyond = np.copysign(np.inf, intercept) * math.copysign(1.0, fitted_gamma)
        return np.where(np.sign(gamma) == np.sign(fitted_gamma), intercept / gamma, beyond)


def fit(runs: Runs, *, against: str, samples: int, generator: np.random.Generator) -> PowerLaw:
    """Fits one arm. If several runs share an X, the one with the lowest loss is used.

    Args:
      runs: the runs of one arm, with at least three different X.
      against: "parameters", or "flops" for a law in training compute (runs of about equal compute share an X).
      samples: bootstrap replicates for the intervals.
      generator: random generator for the replicates.
    """
    used = runs.best(runs.budgets() if against == "flops" else runs.parameters_R)
    x_R = used.flops_R if against == "flops" else used.parameters_R
    center = float(np.mean(np.log(x_R)))
    return PowerLaw(used, x_R, center, bootstrap.least_squares(_design(x_R, center), used.losses_R, samples, generator))


def _design(x_R: np.ndarray, center: float) -> np.ndarray:
    return np.stack([np.ones(len(x_R)), np.log(x_R) - center], axis=1)


def summary(law: PowerLaw, confidence: float) -> dict:
    """Coefficients with intervals, goodness of fit and leave-one-out errors, serializable as JSON.

    beta.low and beta.high are None if the interval of gamma includes zero, because beta is then unbounded.
    """
    with np.errstate(over="ignore"):
        beta = bootstrap.interval(np.exp(law.log_beta), np.exp(law.log_betas_B), confidence)
    gamma = bootstrap.interval(law.gamma, law.line.replicates_BxI[:, 1], confidence)
    if gamma["low"] <= 0.0 <= gamma["high"]:
        beta |= {"low": None, "high": None}
    return {
        "beta": beta,
        "gamma": gamma,
        "goodness": goodness(law),
        "leave_one_out": leave_one_out(law),
        "runs": described(law.runs),
    }


def described(runs: Runs) -> list[dict]:
    """Runs as JSON values; the perplexity of several seeds is their geometric mean."""
    rows = zip(runs.parameters_R, runs.tokens_R, runs.flops_R, np.exp(runs.losses_R), runs.seeds_R, strict=True)
    names = ("parameters", "tokens", "flops", "perplexity", "seeds")
    return [dict(zip(names, map(float, row[:4]), strict=False)) | {"seeds": int(row[4])} for row in rows]


def goodness(law: PowerLaw) -> dict:
    """Goodness of fit; scatters are standard deviations of log perplexity, which approximate relative errors.

    lack_of_fit_p: p-value of the F test of the scatter around the line against the scatter between seeds; small if the
    points deviate from a power law by more than seed variation explains. None without repeated seeds.
    """
    runs, total = law.runs, float(np.sum(np.square(law.runs.losses_R - np.mean(law.runs.losses_R))))
    of_seeds = int(np.sum(runs.seeds_R - 1))
    squares = float(np.sum(runs.squares_R))
    probability = None
    if of_seeds and squares > 0.0:
        # The mean over seeds varies less than a single seed does.
        around = law.line.scatter**2 * len(runs) / np.sum(1.0 / runs.seeds_R)
        probability = float(scipy.special.fdtrc(law.line.degrees_of_freedom, of_seeds, around * of_seeds / squares))
    return {
        "r_squared": 1.0 - float(law.line.residuals_R @ law.line.residuals_R) / total if total > 0.0 else None,
        "scatter_of_sizes": law.line.scatter,
        "scatter_of_seeds": math.sqrt(squares / of_seeds) if of_seeds else None,
        "degrees_of_freedom": law.line.degrees_of_freedom,
        "lack_of_fit_p": probability,
    }


def leave_one_out(law: PowerLaw) -> dict:
    """Each size predicted by a law fitted to the others; the error is predicted / observed perplexity - 1."""
    sizes = []
    for left_out in range(len(law.x_R)):
        others = np.arange(len(law.x_R)) != left_out
        design_RxI = _design(law.x_R, law.center)
        coefficients_I = np.linalg.pinv(design_RxI[others]) @ law.runs.losses_R[others]
        predicted = float(design_RxI[left_out] @ coefficients_I)
        observed = float(law.runs.losses_R[left_out])
        sizes.append({"x": float(law.x_R[left_out]), "observed": math.exp(observed), "predicted": math.exp(predicted)})
    return with_errors(sizes)


def with_errors(predictions: list[dict]) -> dict:
    """The relative error of each prediction, their root mean square, and the largest."""
    errors = [prediction["predicted"] / prediction["observed"] - 1.0 for prediction in predictions]
    return {
        "root_mean_square_error": float(np.sqrt(np.mean(np.square(errors)))),
        "largest_error": float(max(errors, key=abs)),
        "predictions": [prediction | {"error": error} for prediction, error in zip(predictions, errors, strict=True)],
    }
