"""The report's text: the verdict in words, and number formats."""

from __future__ import annotations

from mlpmem_jax.corpus import overlap
from mlpmem_jax.evaluation.figures import LABELS
from mlpmem_jax.evaluation.intervals import FEW_CLUSTERS

ABSENT = "n/a"
_REPLACED = 0.9  # above this lambda the base hardly contributes

_CONTROLS = {
    "continued": "the base trained further with the memory's training compute",
    "ce_only": "the same memory trained without kNN targets",
}


def verdict(metrics: dict) -> list[str]:
    """What the test split shows, as sentences; a gain is claimed only if the interval excludes 1."""
    of, weight = metrics["perplexity"]["test"], metrics["interpolation_weight"]["memory"]
    low, high = metrics["interval"]["test"]["augmented_over_base"]
    size = {name: magnitude(count) for name, count in metrics["counts"]["parameters"].items()}
    subject = f"memory of {size['memory']} parameters with a base LM of {size['base']}"
    measured = (
        f"from {number(of['base'])} to {number(of['augmented'])} at λ {weight:.2f} (ratio "
        f"{of['augmented'] / of['base']:.3f}, {level(metrics)} interval {interval([low, high])})"
    )
    if low <= 1.0 <= high:
        sentences = [f"No gain can be claimed: for a {subject}, test perplexity changes {measured}, which includes 1."]
    elif low > 1.0:
        sentences = [f"The memory makes the base worse: for a {subject}, test perplexity rises {measured}."]
    else:
        sentences = [f"A {subject} lowers test perplexity {measured}."]
    alone = number(of["memory"])
    if weight > _REPLACED:
        sentences.append(
            f"At such a high λ the memory replaces the base rather than helping it: alone it reaches {alone}."
        )
    else:
        sentences.append(f"The memory alone reaches {alone}.")
    if high < 1.0:
        sentences += _compared(metrics)
    if (clusters := metrics["interval"]["clusters"]) < FEW_CLUSTERS:
        kind = metrics["interval"]["cluster"]
        sentences.append(f"The test split has only {clusters} {kind}s, too few for informative intervals.")
    if (repeated := metrics["overlap"].get("test", {}).get("13", 0.0)) > overlap.MUCH:
        sentences.append(
            f"{percent(repeated)} of the test split's words are in 13-word runs that also occur in the training text: "
            "part of the gain is copying."
        )
    return sentences


def _compared(metrics: dict) -> list[str]:
    """Compares the gain with those of kNN search and of the controls."""
    of, sentences = metrics["perplexity"]["test"], []
    if (kept := metrics["gain_kept"]["test"]) is not None and metrics["interval"]["test"]["knn_lm_over_base"][1] < 1.0:
        sentences.append(
            f"Searching the datastore (kNN-LM) reaches {number(of['knn_lm'])}; "
            f"the memory keeps {percent(kept)} of that gain."
        )
    for is_better, words, conjunction in (
        (True, "better than", "and than"),
        (None, "not shown to differ from", "or from"),
        (False, "worse than", "and than"),
    ):
        named = [
            f"{_CONTROLS.get(name, name)} ({number(control['perplexity']['test'])})"
            for name, control in metrics["controls"].items()
            if beats(control) is is_better
        ]
        if named:
            sentences.append(f"The mixture is {words} {f' {conjunction} '.join(named)}.")
    sentences += [
        _with_memory(name, control) for name, control in metrics["controls"].items() if "with_memory" in control
    ]
    return sentences


def _with_memory(name: str, control: dict) -> str:
    """Whether the memory helps a control that is a language model."""
    mixed = control["with_memory"]
    alone, together = control["perplexity"]["test"], mixed["perplexity"]["test"]
    low, high = mixed["interval_over_it"]
    verb = "lowers" if high < 1.0 else "raises" if low > 1.0 else "is not shown to change"
    return (
        f"Mixed with {_CONTROLS.get(name, name)} instead, the same memory {verb} its perplexity, {number(alone)} to "
        f"{number(together)} at λ {mixed['interpolation_weight']:.2f} (ratio {together / alone:.3f}, "
        f"{interval([low, high])})."
    )


def beats(control: dict) -> bool | None:
    """Whether base + memory is better than the control; None if the interval of their ratio includes 1."""
    low, high = control["interval_of_augmented_over_it"]
    return None if low <= 1.0 <= high else high < 1.0


def label(name: str) -> str:
    """The display name of a system, on one line."""
    return LABELS.get(name, name).replace("\n", " ")


def level(metrics: dict) -> str:
    """The confidence level of the intervals, as a percentage."""
    return f"{100 * metrics['confidence']:g} %"


def interval(bounds: list[float]) -> str:
    """Formats the interval of a ratio."""
    low, high = bounds
    return f"{low:.3f} to {high:.3f}"


def percent(share: float) -> str:
    """Formats a share in whole percent."""
    return f"{100 * share:.0f} %"


def number(value: float) -> str:
    """Formats a perplexity."""
    return f"{value:,.2f}" if value < 1000 else f"{value:,.0f}"


def magnitude(value: int) -> str:
    """Formats a large count in millions or billions."""
    for unit, name in ((10**9, "billion"), (10**6, "million")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:,}"


def quantity(value: float) -> str:
    """Formats a count or measurement: no decimals from 100 on, one from 10 on, else three digits."""
    return (
        f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.1f}" if value >= 10 else f"{value:.3g}"
    )
