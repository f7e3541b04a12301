"""Differences between systems on the same questions, with paired bootstrap intervals."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.stats


def paired_interval(differences_N: np.ndarray, confidence: float, seed: int) -> list[float]:
    """Bootstrap interval [low, high] over questions of the mean difference between two systems."""
    differences_N = np.asarray(differences_N, np.float64)
    if len(differences_N) < 2 or np.ptp(differences_N) == 0:
        return [float(differences_N.mean())] * 2
    interval = scipy.stats.bootstrap(
        (differences_N,), np.mean, confidence_level=confidence, method="percentile", n_resamples=5000,
        rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return [float(interval.low), float(interval.high)]


def of_pairs(values: Mapping[str, Sequence[float]], confidence: float, seed: int) -> list[dict]:
    """The mean difference of every two systems, largest first.

    Args:
      values: system -> its metric for each question.
      confidence: of the intervals.
      seed: random seed of the resampling.

    Returns:
      Records with "better" and "worse" (names of systems), "mean" (not negative) and "interval" [low, high].
    """
    records = []
    for names in itertools.combinations(values, 2):
        better, worse = sorted(names, key=lambda name: -float(np.mean(values[name])))
        differences_N = np.subtract(values[better], values[worse])
        interval = paired_interval(differences_N, confidence, seed)
        records.append({"better": better, "worse": worse, "mean": float(differences_N.mean()), "interval": interval})
    return sorted(records, key=lambda record: -record["mean"])
