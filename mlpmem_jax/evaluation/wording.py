"""How the report says things: the verdict in words, and numbers as text."""

from __future__ import annotations

from mlpmem_jax.evaluation.figures import LABELS

ABSENT = "n/a"


_CONTROLS = {
    "continued": "the base trained on with the memory's training compute",
    "ce_only": "the same memory trained without kNN targets",
}


def verdict(metrics: dict) -> list[str]:
    """What the test split shows, sentence by sentence; a gain is claimed only where the interval excludes 1."""
    of, intervals = metrics["perplexity"]["test"], metrics["interval"]["test"]
    low, high = intervals["augmented_over_base"]
    measured = (
        f"from {number(of['base'])} to {number(of['augmented'])} (ratio {of['augmented'] / of['base']:.3f}, "
        f"{level(metrics)} interval {interval([low, high])})"
    )
    if low <= 1.0 <= high:
        return [f"No gain can be claimed: test perplexity goes {measured}, and the interval includes 1."]
    if low > 1.0:
        return [f"The memory makes the base model worse: test perplexity rises {measured}."]
    sentences = [f"The memory lowers the base model's test perplexity {measured}."]
    if (kept := metrics["gain_kept"]["test"]) is not None and intervals["knn_lm_over_base"][1] < 1.0:
        sentences.append(f"That is {percent(kept)} of the gain of searching the datastore (kNN-LM).")
    beaten = [_CONTROLS.get(name, name) for name, control in metrics["controls"].items() if is_beaten(control)]
    others = [_CONTROLS.get(name, name) for name, control in metrics["controls"].items() if not is_beaten(control)]
    if beaten:
        sentences.append(f"It does better than {' and than '.join(beaten)}.")
    if others:
        sentences.append(f"It is not shown to do better than {' or than '.join(others)}.")
    return sentences


def is_beaten(control: dict) -> bool:
    """Whether base + memory is better than the control, the whole interval of their ratio below 1."""
    return control["interval_of_augmented_over_it"][1] < 1.0


def label(name: str) -> str:
    """What a system is called, on one line."""
    return LABELS.get(name, name).replace("\n", " ")


def level(metrics: dict) -> str:
    """The confidence of the intervals, as a percentage."""
    return f"{100 * metrics['confidence']:g} %"


def interval(bounds: list[float]) -> str:
    """[low, high] of a ratio."""
    low, high = bounds
    return f"{low:.3f} to {high:.3f}"


def percent(share: float) -> str:
    """A share in whole percent."""
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """A perplexity."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def magnitude(value: int) -> str:
    """A large count in millions or billions."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,}"


def quantity(value: float) -> str:
    """A count or a measured figure: whole from 100 on, one decimal from 10 on, else three digits."""
    return (
        f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
    )
