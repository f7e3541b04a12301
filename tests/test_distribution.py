import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from retrieval_data import knn_distribution

from mlpmem_jax.retrieval.distribution import sparse_distributions, total_variation


def rows(distributions):
    """Dictionaries of token to probability, in stored order."""
    bounds = distributions.offsets_Q1
    return [
        dict(
            zip(
                distributions.token_ids_M[start:stop].tolist(),
                distributions.probabilities_M[start:stop].tolist(),
                strict=True,
            )
        )
        for start, stop in itertools.pairwise(bounds)
    ]


def random_neighbors(seed, queries=7, k=30, vocabulary=12, scale=20.0):
    rng = np.random.default_rng(seed)
    distances = rng.uniform(0, scale, (queries, k)).astype(np.float32)
    tokens = rng.integers(vocabulary, size=(queries, k)).astype(np.int32)
    return distances, tokens, rng.integers(vocabulary, size=queries).astype(np.int32)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 100), st.integers(1, 40))
def test_agrees_with_the_papers_sum(seed, temperature, k):
    distances, tokens, labels = random_neighbors(seed, k=k)
    actual = sparse_distributions(distances, tokens, labels, temperature)
    for q, row in enumerate(rows(actual)):
        expected = knn_distribution(distances[q].astype(float), tokens[q], temperature)
        assert set(row) <= set(expected)
        for token, probability in expected.items():
            assert row.get(token, 0.0) == pytest.approx(probability, rel=1e-4, abs=1e-7)
        assert actual.label_probabilities_Q[q] == pytest.approx(expected.get(labels[q], 0.0), rel=1e-4, abs=1e-7)
        assert list(row.values()) == sorted(row.values(), reverse=True)
        assert sum(row.values()) == pytest.approx(1, abs=1e-5)


def test_very_far_neighbors_do_not_underflow():
    distances = np.array([[1e6, 1e6 + 1, np.inf]], np.float32)
    actual = sparse_distributions(distances, np.array([[3, 5, 5]]), np.array([5]), temperature=1.0)
    assert rows(actual)[0] == pytest.approx({3: 1 / (1 + np.exp(-1)), 5: np.exp(-1) / (1 + np.exp(-1))})


def test_the_order_of_neighbors_changes_no_bit():
    distances, tokens, labels = random_neighbors(1)
    order = np.random.default_rng(2).permutation(distances.shape[1])
    left = sparse_distributions(distances, tokens, labels, 3.0)
    right = sparse_distributions(distances[:, order], tokens[:, order], labels, 3.0)
    np.testing.assert_array_equal(left.probabilities_M, right.probabilities_M)
    np.testing.assert_array_equal(left.token_ids_M, right.token_ids_M)


def test_a_position_without_neighbors_is_empty():
    distances, tokens, labels = random_neighbors(3)
    distances[2], tokens[2] = np.inf, -1
    actual = sparse_distributions(distances, tokens, labels, 3.0)
    assert np.diff(actual.offsets_Q1)[2] == 0
    assert actual.label_probabilities_Q[2] == 0
    others = np.delete(np.arange(7), 2)
    alone = sparse_distributions(distances[others], tokens[others], labels[others], 3.0)
    np.testing.assert_array_equal(actual.probabilities_M, alone.probabilities_M)


def test_missing_neighbors_have_no_weight():
    distances, tokens, labels = random_neighbors(4)
    padded = np.pad(distances, ((0, 0), (0, 5)), constant_values=np.inf)
    actual = sparse_distributions(padded, np.pad(tokens, ((0, 0), (0, 5)), constant_values=-1), labels, 3.0)
    np.testing.assert_array_equal(
        actual.probabilities_M, sparse_distributions(distances, tokens, labels, 3.0).probabilities_M
    )


@pytest.mark.parametrize(("minimum", "keep"), [(0.0, 3), (0.05, 0), (0.05, 2), (0.0, 100)])
def test_what_is_cut_is_reported_and_the_rest_scaled(minimum, keep):
    distances, tokens, labels = random_neighbors(5)
    whole = rows(sparse_distributions(distances, tokens, labels, 4.0))
    actual = sparse_distributions(distances, tokens, labels, 4.0, minimum, keep)
    for q, row in enumerate(rows(actual)):
        expected = {token: p for token, p in whole[q].items() if p > minimum}
        expected = dict(list(expected.items())[: keep or None])
        mass = sum(expected.values())
        assert list(row) == list(expected)
        assert row == pytest.approx({token: p / mass for token, p in expected.items()}, rel=1e-5)
        assert actual.dropped_mass_Q[q] == pytest.approx(1 - mass, abs=1e-5)
    uncut = sparse_distributions(distances, tokens, labels, 4.0)
    np.testing.assert_array_equal(actual.label_probabilities_Q, uncut.label_probabilities_Q)


def test_total_variation_by_its_definition():
    p_sparse = sparse_distributions(*random_neighbors(6), 2.0)
    q_sparse = sparse_distributions(*random_neighbors(7), 2.0)
    expected = [
        0.5 * sum(abs(p.get(token, 0) - q.get(token, 0)) for token in {*p, *q})
        for p, q in zip(rows(p_sparse), rows(q_sparse), strict=True)
    ]
    np.testing.assert_allclose(total_variation(p_sparse, q_sparse), expected, rtol=1e-5)
    np.testing.assert_array_equal(total_variation(p_sparse, p_sparse), 0)
