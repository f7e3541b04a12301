"""Interpolation of distributions against their equation in probabilities, in float64."""

import hypothesis
import hypothesis.extra.numpy as numpy_strategies
import hypothesis.strategies as st
import numpy as np
import pytest

from mlpmem_jax.models import interpolation

log_probabilities = numpy_strategies.arrays(np.float32, 40, elements=st.floats(-30.0, 0.0, width=32))


def perplexity_oracle(base_N, other_N, weight):
    base_N, other_N = np.exp(base_N.astype(np.float64)), np.exp(other_N.astype(np.float64))
    probabilities_N = weight * other_N + (1 - weight) * base_N
    return np.prod(probabilities_N ** (-1.0 / len(probabilities_N)))


@hypothesis.given(log_probabilities, log_probabilities, st.floats(0.0, 1.0))
def test_mixture_is_the_mixture_of_probabilities(base_N, other_N, weight):
    actual = interpolation.mixture_perplexity(base_N, other_N, weight)
    assert actual == pytest.approx(perplexity_oracle(base_N, other_N, weight), rel=1e-9)


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(log_probabilities, log_probabilities)
def test_tuned_weight_is_at_least_as_good_as_every_weight_of_a_fine_grid(base_N, other_N):
    weight, tuned = interpolation.tune_weight(base_N, other_N)
    assert 0.0 <= weight <= 1.0
    assert tuned == pytest.approx(interpolation.mixture_perplexity(base_N, other_N, weight), rel=1e-12)
    finest = min(perplexity_oracle(base_N, other_N, candidate) for candidate in np.linspace(0, 1, 501))
    assert tuned <= finest * (1 + 1e-7)


def test_ends_are_exact_where_one_distribution_gives_no_probability():
    base_N, knn_N = np.log([0.5, 0.25]), np.array([-np.inf, np.log(0.5)])
    assert interpolation.mixture_perplexity(base_N, knn_N, 0.0) == pytest.approx(np.sqrt(8))
    assert interpolation.mixture_perplexity(base_N, knn_N, 1.0) == np.inf
    assert interpolation.mixture_perplexity(knn_N, base_N, 1.0) == pytest.approx(np.sqrt(8))
    weight, tuned = interpolation.tune_weight(base_N, knn_N)
    # (1 - w) / 2 * (1 + w) / 4 falls from w = 0 on.
    assert (weight, tuned) == (0.0, pytest.approx(np.sqrt(8)))


def test_a_known_optimum_inside_is_found():
    base_N, knn_N = np.log([0.2, 0.2, 0.2]), np.array([-np.inf, 0.0, 0.0])
    # d/dw [log(1 - w) + 2 log(0.2 + 0.8 w)] = 0 at w = 7 / 12.
    weight, tuned = interpolation.tune_weight(base_N, knn_N)
    assert weight == pytest.approx(7 / 12, abs=1e-5)
    assert tuned == pytest.approx(perplexity_oracle(base_N, knn_N, 7 / 12), rel=1e-9)


def test_a_useless_distribution_gets_zero_and_a_better_everywhere_one_gets_one():
    base_N = np.log([0.3, 0.6, 0.1])
    alone = interpolation.perplexity(base_N)
    assert interpolation.tune_weight(base_N, base_N - 1.0) == (0.0, pytest.approx(alone))
    assert interpolation.tune_weight(base_N - 1.0, base_N)[0] == 1.0
    assert interpolation.tune_weight(base_N, base_N)[0] == 0.0


@pytest.mark.parametrize(
    ("base_N", "other_N", "message"),
    [
        ([], [], "no positions"),
        ([-1.0, np.nan], [-1.0, -1.0], "NaN"),
        ([-1.0], [0.5], "at most 0"),
        ([-1.0], [-1.0, -2.0], "different positions"),
    ],
)
def test_bad_scores_are_refused(base_N, other_N, message):
    with pytest.raises(ValueError, match=message):
        interpolation.tune_weight(base_N, other_N)


def test_weight_outside_the_unit_interval_is_refused():
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        interpolation.mixture_perplexity([-1.0], [-1.0], 1.5)
