"""Compares two arms: the ratio of their exponents, and a verdict in words on what the data support."""

from __future__ import annotations

import math

import numpy as np
import scipy.optimize
import scipy.special

from mlpmem_jax.evaluation.wording import magnitude
from mlpmem_jax.scaling import bootstrap
from mlpmem_jax.scaling.points import SAME_BUDGET
from mlpmem_jax.scaling.power_law import PowerLaw, goodness

PREFERRED_REFERENCE, PREFERRED_ARM = "continued", "augmented"
Laws = tuple[PowerLaw, PowerLaw]  # laws of the reference and of the arm compared with it
_GAMMA = np.array([0.0, 1.0])  # weights of height and gamma


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """(reference, arm) of every comparison, the main one first; empty for a single arm.

    The reference is "continued" if there is such an arm, else the first arm; the main comparison is with
    "augmented" if there is one, else with the first other arm.
    """
    reference = PREFERRED_REFERENCE if PREFERRED_REFERENCE in arms else arms[0]
    others = [arm for arm in arms if arm != reference]
    return [(reference, arm) for arm in sorted(others, key=lambda arm: arm != PREFERRED_ARM)]


def compare(reference: tuple[str, PowerLaw], other: tuple[str, PowerLaw], *, against: str, confidence: float) -> dict:
    """Compares the laws of two arms, fitted independently.

    Differences between arms have Student's t intervals with Welch's degrees of freedom, because the arms' scatters may
    differ; the ratio of exponents has Fieller's interval, built the same way.

    Args:
      reference: name and law of the reference arm.
      other: name and law of the arm to compare with it.
      against: "parameters" or "flops", the independent variable of the laws.
      confidence: confidence level of the intervals.

    Returns:
      reference, arm: the arms' names.
      gamma_ratio: gamma of the arm over that of the reference, with its interval; the interval is None if
        the reference's gamma may be zero, because the ratio is then unbounded.
      gamma_difference: arm minus reference.
      perplexity_ratio: arm over reference, both fitted, at `x`, the largest X that both arms reach; None if the
        arms' ranges do not overlap.
      equal_compute: whether the two arms' runs spent the same training budgets.
      verdict: what the data support, in words.
    """
    (reference_name, law), (name, other_law) = reference, other
    laws = law, other_law
    low, high = _difference(laws, [_GAMMA, _GAMMA], confidence)
    comparison = {
        "reference": reference_name,
        "arm": name,
        "gamma_ratio": _ratio(laws, confidence),
        "gamma_difference": {"value": other_law.gamma - law.gamma, "low": low, "high": high},
        "perplexity_ratio": _perplexity_ratio(laws, confidence),
        "equal_compute": _equal_compute(*laws),
    }
    gammas = [bootstrap.interval(each.gamma, each.line.replicates_BxI[:, 1], confidence) for each in laws]
    return comparison | {"verdict": " ".join(_sentences(comparison, laws, gammas, against, confidence))}


def _half_width(laws: Laws, variances: list[float], confidence: float) -> float:
    """Half width of the interval of a difference of two independent estimates, with Welch's degrees of freedom."""
    degrees = [law.line.degrees_of_freedom for law in laws]
    total = sum(variances)
    welch = total**2 / sum(variance**2 / each for variance, each in zip(variances, degrees, strict=True))
    return float(scipy.special.stdtrit(welch, 0.5 + confidence / 2.0) * math.sqrt(total))


def _difference(laws: Laws, weights: list[np.ndarray], confidence: float) -> tuple[float, float]:
    """Bounds of the second arm's weighted sum of height and gamma minus the first arm's."""
    (value, variance), (other, other_variance) = (
        law.combination(each) for law, each in zip(laws, weights, strict=True)
    )
    half = _half_width(laws, [variance, other_variance], confidence)
    return other - value - half, other - value + half


def _ratio(laws: Laws, confidence: float) -> dict:
    """Fieller's interval: all r for which gamma - r gamma_reference is not significantly different from zero."""
    (reference, reference_variance), (gamma, variance) = (law.combination(_GAMMA) for law in laws)
    ratio = gamma / reference if reference else math.nan

    def margin(r: float) -> float:
        return abs(gamma - r * reference) - _half_width(laws, [r**2 * reference_variance, variance], confidence)

    bounds = {}
    for name, direction in (("low", -1.0), ("high", 1.0)):
        steps = direction * abs(ratio) * 2.0 ** np.arange(-40, 41)
        outside = [ratio + step for step in steps if margin(ratio + step) > 0.0]
        bounds[name] = float(scipy.optimize.brentq(margin, ratio, outside[0])) if outside else None
    if None in bounds.values():
        bounds = {"low": None, "high": None}
    return {"value": bootstrap.finite(ratio), **bounds}


def _includes(interval: dict, value: float) -> bool:
    """Whether an interval contains the value; a missing bound is unbounded."""
    low = -math.inf if interval["low"] is None else interval["low"]
    high = math.inf if interval["high"] is None else interval["high"]
    return low <= value <= high


def _perplexity_ratio(laws: Laws, confidence: float) -> dict | None:
    x = min(law.x_R.max() for law in laws)
    if x < max(law.x_R.min() for law in laws):
        return None
    low, high = _difference(laws, [np.array([1.0, math.log(x) - law.center]) for law in laws], confidence)
    bounds = {"low": low, "value": (low + high) / 2.0, "high": high}
    with np.errstate(over="ignore"):
        return {"x": float(x)} | {name: bootstrap.finite(np.exp(bounds[name])) for name in ("value", "low", "high")}


def _equal_compute(law: PowerLaw, other: PowerLaw) -> bool:
    flops, other_flops = np.sort(law.runs.flops_R), np.sort(other.runs.flops_R)
    if len(flops) != len(other_flops):
        return False
    return bool(np.all(np.maximum(flops / other_flops, other_flops / flops) <= SAME_BUDGET))


def _sentences(comparison: dict, laws: Laws, gammas: list[dict], against: str, confidence: float) -> list[str]:
    reference, arm, ratio = comparison["reference"], comparison["arm"], comparison["gamma_ratio"]
    level, what = f"{100 * confidence:g} %", "training compute" if against == "flops" else "size"
    for name, gamma in zip((reference, arm), gammas, strict=True):
        if gamma["high"] >= 0.0:
            return [
                f"The exponents cannot be compared: the perplexity of {name} does not clearly fall with {what} "
                f"(gamma {_with_interval(gamma, level)})."
            ]
    measured = f"gamma {gammas[1]['value']:.3f} against {gammas[0]['value']:.3f}, ratio {_with_interval(ratio, level)}"
    if _includes(ratio, 1.0):
        sentences = [f"The data do not support a difference in exponents between {arm} and {reference}: {measured}."]
    else:
        steeper = "steeper" if ratio["low"] > 1.0 else "shallower"
        sentences = [f"The data support a {steeper} exponent of {arm} than of {reference}: {measured}."]
    if (ratio_at_x := comparison["perplexity_ratio"]) is not None:
        x = (
            f"{ratio_at_x['x']:.3g} FLOPs".replace("e+", "e")
            if against == "flops"
            else f"{magnitude(round(ratio_at_x['x']))} parameters"
        )
        how = "not shown to differ" if _includes(ratio_at_x, 1.0) else "lower" if ratio_at_x["high"] < 1.0 else "higher"
        sentences.append(f"At {x} the fitted perplexity of {arm} is {how}: ratio {_with_interval(ratio_at_x, level)}.")
    sentences += [warning for name, each in zip((reference, arm), laws, strict=True) for warning in _doubts(name, each)]
    if not comparison["equal_compute"]:
        sentences.append("The two arms did not spend the same training compute.")
    return sentences


def _doubts(arm: str, law: PowerLaw) -> list[str]:
    """Caveats: perplexities that cannot be right, or points that a straight line does not fit."""
    if np.min(law.runs.losses_R) <= 0.0:
        return [f"Perplexities of {arm} are below 1, which is impossible for a language model."]
    fit = goodness(law)
    if fit["lack_of_fit_p"] is not None and fit["lack_of_fit_p"] < 0.01:
        return [
            f"The points of {arm} deviate from a power law by more than seeds explain (p = {fit['lack_of_fit_p']:.2g})."
        ]
    if fit["r_squared"] is not None and fit["r_squared"] < 0.9:
        return [f"A power law describes the points of {arm} poorly (R squared {fit['r_squared']:.2f})."]
    return []


def _with_interval(estimate: dict, level: str) -> str:
    low, high = ("unbounded" if bound is None else f"{bound:.3g}" for bound in (estimate["low"], estimate["high"]))
    return f"{estimate['value']:.3g} ({level} interval {low} to {high})"
