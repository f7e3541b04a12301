"""Two arms side by side: the ratio of their exponents, and what the data support, in words."""

from __future__ import annotations

import math

import numpy as np

from mlpmem_jax.scaling import draws
from mlpmem_jax.scaling.points import SAME_BUDGET
from mlpmem_jax.scaling.power_law import PowerLaw

PREFERRED_REFERENCE, PREFERRED_ARM = "continued", "augmented"


def pairs(arms: list[str]) -> list[tuple[str, str]]:
    """(reference, arm) of every comparison, the main one first; empty for a single arm.

    The reference is "continued" where there is such an arm, else the first; the main comparison is that of
    "augmented" where there is one, else of the first other arm.
    """
    reference = PREFERRED_REFERENCE if PREFERRED_REFERENCE in arms else arms[0]
    others = [arm for arm in arms if arm != reference]
    return [(reference, arm) for arm in sorted(others, key=lambda arm: arm != PREFERRED_ARM)]


def compare(reference: tuple[str, PowerLaw], other: tuple[str, PowerLaw], *, against: str, confidence: float) -> dict:
    """Compares the laws of two arms, each drawn independently.

    Args:
      reference: name and law of the arm compared with.
      other: name and law of the arm in question.
      against: "parameters" or "flops", what the laws are laws in.
      confidence: of the intervals.

    Returns:
      reference, arm: their names.
      gamma_ratio: gamma of the arm over that of the reference, with its interval; the interval is None where
        the reference's own gamma may be zero, because the ratio is then unbounded.
      gamma_difference: arm minus reference.
      perplexity_ratio: arm over reference, both fitted, at `x`, the largest X that both arms reach; None where the
        arms' ranges do not overlap.
      equal_compute: whether the two arms' runs spent the same training budgets.
      verdict: what the data support.
    """
    (reference_name, law), (name, other_law) = reference, other
    ratio = draws.interval(other_law.gamma / law.gamma, other_law.gammas_S / law.gammas_S, confidence)
    gammas = [draws.interval(each.gamma, each.gammas_S, confidence) for each in (law, other_law)]
    if _includes(gammas[0], 0.0):
        ratio |= {"low": None, "high": None}
    found = {
        "reference": reference_name,
        "arm": name,
        "gamma_ratio": ratio,
        "gamma_difference": draws.interval(
            other_law.gamma - law.gamma, other_law.gammas_S - law.gammas_S, confidence
        ),
        "perplexity_ratio": _perplexity_ratio(law, other_law, confidence),
        "equal_compute": _equal_compute(law, other_law),
    }
    return found | {"verdict": " ".join(_sentences(found, gammas, against, confidence))}


def _includes(interval: dict, value: float) -> bool:
    """Whether an interval holds the value; an absent bound is no bound."""
    low = -math.inf if interval["low"] is None else interval["low"]
    high = math.inf if interval["high"] is None else interval["high"]
    return low <= value <= high


def _perplexity_ratio(law: PowerLaw, other: PowerLaw, confidence: float) -> dict | None:
    x = min(law.x_U.max(), other.x_U.max())
    if x < max(law.x_U.min(), other.x_U.min()):
        return None
    value = math.exp(other.losses(x) - law.losses(x))
    at_Sx1 = np.exp(other.drawn_losses(np.array([x])) - law.drawn_losses(np.array([x])))
    return {"x": float(x)} | draws.interval(value, at_Sx1[:, 0], confidence)


def _equal_compute(law: PowerLaw, other: PowerLaw) -> bool:
    flops, other_flops = np.sort(law.runs.flops_R), np.sort(other.runs.flops_R)
    if len(flops) != len(other_flops):
        return False
    return bool(np.all(np.maximum(flops / other_flops, other_flops / flops) <= SAME_BUDGET))


def _sentences(found: dict, gammas: list[dict], against: str, confidence: float) -> list[str]:
    reference, arm, ratio = found["reference"], found["arm"], found["gamma_ratio"]
    level, what = f"{100 * confidence:g} %", "training compute" if against == "flops" else "size"
    for name, gamma in zip((reference, arm), gammas, strict=True):
        if gamma["high"] >= 0.0:
            return [
                f"The exponents cannot be compared: the perplexity of {name} is not shown to fall with {what} "
                f"(gamma {_with_interval(gamma, level)})."
            ]
    measured = f"gamma {gammas[1]['value']:.4g} against {gammas[0]['value']:.4g}, ratio {_with_interval(ratio, level)}"
    if _includes(ratio, 1.0):
        sentences = [f"The data do not support a difference in exponents between {arm} and {reference}: {measured}."]
    else:
        steeper = "steeper" if ratio["low"] > 1.0 else "shallower"
        sentences = [f"The data support a {steeper} exponent of {arm} than of {reference}: {measured}."]
    if (there := found["perplexity_ratio"]) is not None:
        unit = "FLOPs" if against == "flops" else "parameters"
        how = "not shown to differ" if _includes(there, 1.0) else "lower" if there["high"] < 1.0 else "higher"
        sentences.append(
            f"At {there['x']:.3g} {unit} the fitted perplexity of {arm} is {how}: ratio {_with_interval(there, level)}."
        )
    if not found["equal_compute"]:
        sentences.append("The two arms did not spend the same training compute.")
    return sentences


def _with_interval(estimate: dict, level: str) -> str:
    low, high = ("unbounded" if bound is None else f"{bound:.4g}" for bound in (estimate["low"], estimate["high"]))
    return f"{estimate['value']:.4g} ({level} interval {low} to {high})"
