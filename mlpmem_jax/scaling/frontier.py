"""The best model size for a given compute, estimated from the runs in two ways.

The lower envelope keeps the runs that no run with less or equal compute beats. The iso-FLOP method (Hoffmann et al.,
arXiv 2203.15556, section 3.2) fits, at each training budget, a parabola of log perplexity in log parameters, whose
minimum is the best size for that budget. Power laws in compute are fitted to either set of optima: for the size, the
tokens and the perplexity.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import scipy.linalg

from mlpmem_jax.scaling import bootstrap
from mlpmem_jax.scaling.points import LEAST_SIZES, Runs, set_of
from mlpmem_jax.scaling.power_law import described


def envelope(runs: Runs, *, confidence: float, samples: int, generator: np.random.Generator) -> dict:
    """The lower envelope of one arm and its laws in compute, serializable as JSON; or {"absent": reason}.

    The envelope contains only sizes that were run: the true optimum may lie anywhere up to halfway to the next size.
    The replicates spread each optimum over that range, in addition to the scatter of the optima around their law.
    """
    groups_R = runs.budgets()
    best = runs.best(groups_R)
    if len(best) == len(set_of(runs.parameters_R)) == len(runs):
        return {"absent": "each size has its own training budget, so no two sizes can be compared"}
    frontier = best.take(best.losses_R < np.minimum.accumulate(np.append(np.inf, best.losses_R[:-1])))
    if len(frontier) == len(runs):
        return {"absent": "no run is beaten by another with less or equal compute, so every size is on the envelope"}
    if len(frontier) < LEAST_SIZES:
        return {"absent": f"it has {len(frontier)} runs, a law needs {LEAST_SIZES}", "runs": described(frontier)}
    log_flops_R = np.log(frontier.flops_R)
    design_RxI = np.stack([np.ones(len(frontier)), log_flops_R - log_flops_R.mean()], axis=1)
    spread_BxR = np.stack(
        [
            _spread(runs, groups_R, flops, size, samples, generator)
            for flops, size in zip(frontier.flops_R, frontier.parameters_R, strict=True)
        ],
        axis=1,
    )
    of_spread_B = spread_BxR @ np.linalg.pinv(design_RxI)[1]
    exponents = {}
    for name, values_R, spread in (
        ("optimal_parameters", np.log(frontier.parameters_R), 1.0),
        ("optimal_tokens", np.log(frontier.tokens_R), -1.0),
        ("perplexity", frontier.losses_R, 0.0),
    ):
        line = bootstrap.least_squares(design_RxI, values_R, samples, generator)
        drawn_B = line.replicates_BxI[:, 1] + spread * of_spread_B
        exponents[name] = bootstrap.interval(line.coefficients_I[1], drawn_B, confidence)
    return {"exponents": exponents, "runs": described(frontier)}


def _spread(runs: Runs, groups_R: np.ndarray, flops: float, size: float, samples: int, generator) -> np.ndarray:
    """Random log(optimum / size), [B], over the range that a size represents among those run at its budget."""
    budget = runs.take(groups_R == groups_R[np.flatnonzero(runs.flops_R == flops)[0]])
    tried = budget if len(set_of(budget.parameters_R)) > 1 else runs
    sizes = np.log(set_of(tried.parameters_R))
    steps = np.diff(sizes) / 2.0
    place = int(np.searchsorted(sizes, np.log(size)))
    below, above = steps[max(place - 1, 0)], steps[min(place, len(steps) - 1)]
    return generator.uniform(-below, above, samples)


def isoflop(runs: Runs, *, confidence: float, samples: int, generator: np.random.Generator) -> dict:
    """Parabolas of one arm's budgets, their optima, and the optima's laws in compute; or {"absent": reason}.

    Each budget with at least three sizes gives {flops, coefficients (log PPL = c0 + c1 z + c2 z^2 with z = log(N /
    center)), center, smallest, largest (sizes), parameters, tokens, perplexity (at the optimum, each with an
    interval), inside (whether the optimum is within the range of sizes run)}. Scatter is pooled over the budgets.
    Laws are fitted to the optima inside that range, if there are at least three.
    """
    groups_R = runs.budgets()
    budgets = [runs.take(groups_R == group) for group in set_of(groups_R)]
    budgets = [budget for budget in budgets if len(set_of(budget.parameters_R)) >= LEAST_SIZES]
    if not budgets:
        return {"absent": f"no training budget was spent on at least {LEAST_SIZES} sizes"}
    parabolas = _parabolas(budgets, samples, generator)
    inside = [parabola for parabola in parabolas if parabola.is_inside]
    return {
        "budgets": [parabola.described(confidence) for parabola in parabolas],
        "exponents": _exponents(inside, confidence) if len(inside) >= LEAST_SIZES else None,
    }


@dataclasses.dataclass(frozen=True)
class _Parabola:
    """log PPL of one budget by z = log(N / center): coefficients [3] and replicates [B, 3], or None."""

    budget: Runs
    center: float
    coefficients_3: np.ndarray
    draws_Bx3: np.ndarray | None

    def optimum(self, coefficients: np.ndarray) -> dict[str, np.ndarray]:
        """Logarithms of size, tokens and perplexity at the minimum, from coefficients [..., 3]; NaN without one."""
        height, slope, bend = np.moveaxis(coefficients, -1, 0)
        z = -slope / (2.0 * np.where(bend > 0.0, bend, np.nan))
        log_tokens_per_log_size = np.polyfit(
            np.log(self.budget.parameters_R / self.center), np.log(self.budget.tokens_R), 1
        )
        return {
            "parameters": np.log(self.center) + z,
            "tokens": np.polyval(log_tokens_per_log_size, z),
            "perplexity": height + 0.5 * slope * z,
        }

    @property
    def is_inside(self) -> bool:
        best = np.exp(self.optimum(self.coefficients_3)["parameters"])
        return bool(np.min(self.budget.parameters_R) <= best <= np.max(self.budget.parameters_R))

    def described(self, confidence: float) -> dict:
        bounds = {}
        for name, value in self.optimum(self.coefficients_3).items():
            drawn_B = None if self.draws_Bx3 is None else self.optimum(self.draws_Bx3)[name]
            with np.errstate(over="ignore"):
                bounds[name] = bootstrap.interval(
                    np.exp(value), None if drawn_B is None else np.exp(drawn_B), confidence
                )
        return {
            "flops": float(np.median(self.budget.flops_R)),
            "center": self.center,
            "coefficients": self.coefficients_3.tolist(),
            "smallest": float(np.min(self.budget.parameters_R)),
            "largest": float(np.max(self.budget.parameters_R)),
            "inside": self.is_inside,
            **bounds,
        }


def _parabolas(budgets: list[Runs], samples: int, generator: np.random.Generator) -> list[_Parabola]:
    """Solves one least-squares problem for all budgets, with a block of three columns each, to pool their scatter."""
    centers = [float(np.exp(np.mean(np.log(budget.parameters_R)))) for budget in budgets]
    blocks = [
        np.vander(np.log(budget.parameters_R / center), 3, increasing=True)
        for budget, center in zip(budgets, centers, strict=True)
    ]
    losses_R = np.concatenate([budget.losses_R for budget in budgets])
    fitted = bootstrap.least_squares(scipy.linalg.block_diag(*blocks), losses_R, samples, generator)
    return [
        _Parabola(
            budget,
            center,
            fitted.coefficients_I[3 * block : 3 * block + 3],
            None if fitted.replicates_BxI is None else fitted.replicates_BxI[:, 3 * block : 3 * block + 3],
        )
        for block, (budget, center) in enumerate(zip(budgets, centers, strict=True))
    ]


def _exponents(parabolas: list[_Parabola], confidence: float) -> dict:
    """Slopes of the optima's logarithms over log compute; replicates carry the runs' noise through the parabolas."""
    log_flops_R = np.log([np.median(parabola.budget.flops_R) for parabola in parabolas])
    weights_R = (log_flops_R - log_flops_R.mean()) / np.sum(np.square(log_flops_R - log_flops_R.mean()))
    exponents = {}
    for name, key in (("parameters", "optimal_parameters"), ("tokens", "optimal_tokens"), ("perplexity", "perplexity")):
        slope = weights_R @ np.array([parabola.optimum(parabola.coefficients_3)[name] for parabola in parabolas])
        slopes_B = None
        if parabolas[0].draws_Bx3 is not None:
            slopes_B = weights_R @ np.array([parabola.optimum(parabola.draws_Bx3)[name] for parabola in parabolas])
        exponents[key] = bootstrap.interval(slope, slopes_B, confidence)
    return exponents
