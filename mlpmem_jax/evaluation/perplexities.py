"""Compares systems scored on the same positions: perplexities, interpolation weights, intervals.

Pure functions of log-probabilities of the next tokens, [S, T] for S sequences of T positions.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from mlpmem_jax.evaluation import intervals
from mlpmem_jax.models import interpolation

CURVE_WEIGHTS = np.linspace(0.0, 1.0, 51)


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of the next tokens of one split, each float [S, T].

    Attributes:
      base: the base LM.
      memory: the memory alone.
      knn: p_kNN alone; -inf if no neighbor has the next token.
      documents: document of every position, int [S, T].
      other_memories: memories trained in other ways, by name; mixed with the base like the memory.
      other_models: language models to compare with, by name; used unmixed.
    """

    base: np.ndarray
    memory: np.ndarray
    knn: np.ndarray
    documents: np.ndarray
    other_memories: dict[str, np.ndarray]
    other_models: dict[str, np.ndarray]


def compare(validation: Scores, test: Scores, *, confidence: float) -> dict:
    """Tunes every interpolation weight on validation, applies it to test, and compares the systems.

    Args:
      validation: scores on which the weights are tuned.
      test: scores to which the weights are applied.
      confidence: confidence level of the intervals, for example 0.95.

    Returns:
      Nested dictionaries, serializable as JSON:
      perplexity: split -> system -> perplexity, systems base, memory, knn_lm, augmented.
      interpolation_weight: memory, knn_lm and every other memory -> lambda.
      interval: test -> '<system>_over_<reference>' -> [low, high] of the ratio of perplexities; cluster, the kind
        of cluster (document or sequence), and clusters, their number.
      gain_kept: split -> log(base / augmented) / log(base / knn_lm), the share of kNN-LM's gain that the memory
        keeps; None if kNN-LM gains nothing.
      controls: name -> perplexity by split, ratio_over_base, interval_over_base, interval_of_augmented_over_it,
        share_of_memory_gain (on test, None if the memory gains nothing); for a language model also with_memory:
        perplexity by split of its mixture with the memory, interpolation_weight, and interval_over_it, of the ratio to
        the language model alone.
      curves: weights, and split -> memory and knn_lm -> perplexity at each weight, None if infinite.
    """
    weights = {
        "memory": interpolation.tune_weight(validation.base, validation.memory)[0],
        "knn_lm": interpolation.tune_weight(validation.base, validation.knn)[0],
    }
    for name, scores_SxT in validation.other_memories.items():
        weights[name] = interpolation.tune_weight(validation.base, scores_SxT)[0]
    systems = {"validation": mixtures(validation, weights), "test": mixtures(test, weights)}
    perplexity = {
        split: {name: interpolation.perplexity(scores_SxT) for name, scores_SxT in scores.items()}
        for split, scores in systems.items()
    }
    controls = [*test.other_models, *test.other_memories]
    cluster, clusters_SxT = intervals.clusters_of(test.documents)
    common = {"clusters_N": clusters_SxT, "confidence": confidence}
    compared = {name: systems["test"][name] for name in ("augmented", "knn_lm", "memory", *controls)}
    test_intervals = {
        f"{name}_over_base": interval
        for name, interval in intervals.ratio_intervals(test.base, compared, **common).items()
    }
    for reference in ("knn_lm", *controls):
        augmented = {"augmented": systems["test"]["augmented"]}
        interval = intervals.ratio_intervals(systems["test"][reference], augmented, **common)["augmented"]
        test_intervals[f"augmented_over_{reference}"] = interval
    return {
        "perplexity": {
            split: {name: value for name, value in scores.items() if name not in controls}
            for split, scores in perplexity.items()
        },
        "interpolation_weight": weights,
        "interval": {"test": test_intervals, "cluster": cluster, "clusters": int(clusters_SxT.max()) + 1},
        "gain_kept": {split: _share_of_gain(scores, "augmented", of="knn_lm") for split, scores in perplexity.items()},
        "controls": {
            name: {
                "perplexity": {split: scores[name] for split, scores in perplexity.items()},
                "ratio_over_base": perplexity["test"][name] / perplexity["test"]["base"],
                "interval_over_base": test_intervals[f"{name}_over_base"],
                "interval_of_augmented_over_it": test_intervals[f"augmented_over_{name}"],
                "share_of_memory_gain": _share_of_gain(perplexity["test"], name, of="augmented"),
                **({"with_memory": _with_memory(name, validation, test, common)} if name in test.other_models else {}),
            }
            for name in controls
        },
        "curves": {
            "weights": CURVE_WEIGHTS.tolist(),
            "validation": _curves(validation),
            "test": _curves(test),
        },
    }


def _with_memory(name: str, validation: Scores, test: Scores, common: dict) -> dict:
    """Whether the memory helps a language model other than the base it was trained with."""
    weight, of_validation = interpolation.tune_weight(validation.other_models[name], validation.memory)
    alone_SxT = test.other_models[name]
    mixed_SxT = interpolation.mixture_log_probabilities(alone_SxT, test.memory, weight)
    return {
        "perplexity": {"validation": of_validation, "test": interpolation.perplexity(mixed_SxT)},
        "interpolation_weight": weight,
        "interval_over_it": intervals.ratio_intervals(alone_SxT, {"mixed": mixed_SxT}, **common)["mixed"],
    }


def mixtures(scores: Scores, weights: dict[str, float]) -> dict[str, np.ndarray]:
    """Log-probabilities of every compared system, [S, T] by name, mixed at the weights from `compare`."""
    others = {"knn_lm": scores.knn, "augmented": scores.memory, **scores.other_memories}
    mixed = {
        name: interpolation.mixture_log_probabilities(
            scores.base, other_SxT, weights["memory" if name == "augmented" else name]
        )
        for name, other_SxT in others.items()
    }
    return {"base": scores.base, "memory": scores.memory, **mixed, **scores.other_models}


def _share_of_gain(perplexity: dict[str, float], system: str, of: str) -> float | None:
    """log(base / system) / log(base / of); None if `of` has no gain."""
    gain = math.log(perplexity["base"] / perplexity[of])
    return math.log(perplexity["base"] / perplexity[system]) / gain if gain > 0 else None


def _curves(scores: Scores) -> dict[str, list[float | None]]:
    def curve(other_SxT: np.ndarray) -> list[float | None]:
        values = [interpolation.mixture_perplexity(scores.base, other_SxT, weight) for weight in CURVE_WEIGHTS]
        return [value if math.isfinite(value) else None for value in values]

    return {"memory": curve(scores.memory), "knn_lm": curve(scores.knn)}
