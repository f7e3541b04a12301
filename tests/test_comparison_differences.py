"""Paired differences between systems, against a resampling written out."""

import numpy as np
import pytest

from mlpmem_jax.comparison import differences


def test_an_interval_is_that_of_resampled_questions():
    random = np.random.default_rng(1)
    values_N = random.normal(0.3, 1.0, size=80)
    means = np.array([random.choice(values_N, 80).mean() for _ in range(20_000)])
    low, high = differences.paired_interval(values_N, 0.9, seed=0)
    assert [low, high] == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=0.02)


def test_questions_are_paired():
    """Questions differ far more from each other than systems do on one question."""
    random = np.random.default_rng(0)
    hard_N = random.normal(0, 10, size=50)
    values = {"a": hard_N, "b": hard_N + 0.5 + random.normal(0, 0.1, size=50), "c": hard_N}
    records = differences.of_pairs(values, 0.95, seed=0)
    assert [(record["better"], record["worse"]) for record in records] == [("b", "a"), ("b", "c"), ("a", "c")]
    for record in records[:2]:
        assert record["mean"] == pytest.approx(0.5, abs=0.05)
        assert 0.4 < record["interval"][0] < record["mean"] < record["interval"][1] < 0.6
    assert records[2]["mean"] == 0
    assert records[2]["interval"] == [0, 0]
