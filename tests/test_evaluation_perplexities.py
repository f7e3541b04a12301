"""The comparison of systems, from probabilities written down by hand and from the equations."""

import json

import numpy as np
import pytest

from mlpmem_jax.evaluation import perplexities

SETTINGS = {"confidence": 0.95}


def scores(seed, knn_shift=0.4, **others):
    """A base, a memory that is right where the base is not, and a kNN distribution that is often silent."""
    generator = np.random.default_rng(seed)
    base_SxT = -generator.gamma(3.0, size=(40, 16))
    memory_SxT = np.minimum(base_SxT + 0.2 + generator.normal(size=base_SxT.shape), 0.0)
    knn_SxT = np.minimum(base_SxT + knn_shift + generator.normal(size=base_SxT.shape), 0.0)
    knn_SxT[generator.random(base_SxT.shape) < 0.3] = -np.inf
    return perplexities.Scores(
        base_SxT,
        memory_SxT,
        knn_SxT,
        np.arange(40 * 16).reshape(40, 16) // 20,
        other_models={name: base_SxT + shift for name, shift in others.items()},
        other_memories={"ce_only": np.minimum(base_SxT + generator.normal(size=base_SxT.shape), 0.0)},
    )


def test_systems_are_the_mixtures_at_the_weights_of_validation():
    validation, test = scores(0, continued=0.01), scores(1, continued=0.01)
    actual = perplexities.compare(validation, test, **SETTINGS)
    for system, of, weight in (("augmented", "memory", "memory"), ("knn_lm", "knn", "knn_lm")):
        weight = actual["interpolation_weight"][weight]
        mixed_SxT = weight * np.exp(getattr(test, of)) + (1 - weight) * np.exp(test.base)
        assert actual["perplexity"]["test"][system] == pytest.approx(np.exp(-np.mean(np.log(mixed_SxT))))
        low, high = actual["interval"]["test"][f"{system}_over_base"]
        assert low < actual["perplexity"]["test"][system] / actual["perplexity"]["test"]["base"] < high < 1
    for split in ("validation", "test"):
        of = actual["perplexity"][split]
        expected = np.log(of["base"] / of["augmented"]) / np.log(of["base"] / of["knn_lm"])
        assert actual["gain_kept"][split] == pytest.approx(expected)
    assert (actual["interval"]["cluster"], actual["interval"]["clusters"]) == ("document", 32)
    assert set(actual["perplexity"]["test"]) == {"base", "memory", "knn_lm", "augmented"}
    json.dumps(actual, allow_nan=False)


def test_controls_are_compared_with_the_base_and_with_the_memory():
    actual = perplexities.compare(scores(0, continued=0.01), scores(1, continued=0.01), **SETTINGS)
    continued = actual["controls"]["continued"]
    assert continued["ratio_over_base"] == pytest.approx(np.exp(-0.01))
    assert continued["interval_over_base"] == pytest.approx([np.exp(-0.01)] * 2)
    assert "continued" not in actual["interpolation_weight"]
    ce_only = actual["controls"]["ce_only"]
    assert 0 < actual["interpolation_weight"]["ce_only"] < 1
    low, high = ce_only["interval_of_augmented_over_it"]
    assert low < actual["perplexity"]["test"]["augmented"] / ce_only["perplexity"]["test"] < high


def test_the_memory_is_mixed_with_a_control_that_is_a_language_model():
    validation, test = scores(0, continued=0.01), scores(1, continued=0.01)
    actual = perplexities.compare(validation, test, **SETTINGS)
    mixed = actual["controls"]["continued"]["with_memory"]
    assert "with_memory" not in actual["controls"]["ce_only"]

    def perplexity(of, weight):
        mixed_SxT = weight * np.exp(of.memory) + (1 - weight) * np.exp(of.other_models["continued"])
        return np.exp(-np.mean(np.log(mixed_SxT)))

    weight = mixed["interpolation_weight"]
    assert mixed["perplexity"] == pytest.approx(
        {split: perplexity(of, weight) for split, of in (("validation", validation), ("test", test))}
    )
    assert mixed["perplexity"]["validation"] <= min(perplexity(validation, at) for at in np.linspace(0, 1, 101)) + 1e-6
    low, high = mixed["interval_over_it"]
    assert low < mixed["perplexity"]["test"] / actual["controls"]["continued"]["perplexity"]["test"] < high


def test_a_search_that_gains_nothing_has_no_share_to_keep():
    validation, test = scores(0, knn_shift=-60.0), scores(1, knn_shift=-60.0)
    actual = perplexities.compare(validation, test, **SETTINGS)
    assert actual["interpolation_weight"]["knn_lm"] == 0.0
    assert actual["gain_kept"] == {"validation": None, "test": None}
    assert actual["interval"]["test"]["knn_lm_over_base"] == [1.0, 1.0]


def test_curves_start_at_the_base_and_are_silent_where_infinite():
    validation, test = scores(0), scores(1)
    actual = perplexities.compare(validation, test, **SETTINGS)
    curves = actual["curves"]
    assert curves["test"]["memory"][0] == curves["test"]["knn_lm"][0] == actual["perplexity"]["test"]["base"]
    assert curves["test"]["memory"][-1] == actual["perplexity"]["test"]["memory"]
    assert curves["test"]["knn_lm"][-1] is None
    assert min(curves["validation"]["memory"]) >= actual["perplexity"]["validation"]["augmented"] * (1 - 1e-9)
