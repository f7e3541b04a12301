"""Sharpness counts against plain loops over sorted Python lists."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from mlpmem_jax.evaluation import sharpness


def counts_oracle(row):
    above = [sum(1 for p in row if p > threshold) for threshold in sharpness.THRESHOLDS]
    needed = []
    for mass in sharpness.MASSES:
        held, count = 0.0, 0
        for p in sorted(map(float, row), reverse=True):
            held, count = held + p, count + 1
            if held >= mass * sum(map(float, row)) * (1 - 1e-9):
                break
        needed.append(count)
    return above, needed


@hypothesis.settings(deadline=None)
@hypothesis.given(st.integers(0, 2**32 - 1), st.floats(0.01, 3.0))
def test_counts_of_random_distributions(seed, concentration):
    row_V = np.random.default_rng(seed).dirichlet(np.full(30, concentration)).astype(np.float32)
    above, needed = counts_oracle(row_V)
    assert sharpness.tokens_above(row_V[None]).tolist() == [above]
    assert sharpness.tokens_for_mass(row_V[None]).tolist() == [needed]


def test_known_distributions():
    rows_2x5 = np.array([[0.5, 0.3, 0.15, 0.05, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]])
    assert sharpness.tokens_above(rows_2x5).tolist() == [[4, 4, 4, 4, 4, 4, 3], [1] * 7]
    assert sharpness.tokens_for_mass(rows_2x5).tolist() == [[2, 3, 3, 4], [1] * 4]
    assert sharpness.tokens_for_mass(np.zeros((1, 3))).tolist() == [[0] * 4]
    # The sum of a float16 row is not one; shares are of what the row holds.
    assert sharpness.tokens_for_mass(rows_2x5 * 0.98).tolist() == [[2, 3, 3, 4], [1] * 4]


def test_padding_of_sparse_rows_changes_nothing():
    values_M, offsets_N1 = np.array([0.7, 0.3, 0.6, 0.2, 0.1, 0.1], np.float16), np.array([0, 2, 2, 6])
    rows_NxE = sharpness.rows_of_ragged(values_M, offsets_N1)
    np.testing.assert_array_equal(
        rows_NxE, np.array([[0.7, 0.3, 0, 0], [0, 0, 0, 0], [0.6, 0.2, 0.1, 0.1]], np.float16)
    )
    wide_NxE = np.pad(rows_NxE, ((0, 0), (0, 9)))[[0, 2]]
    np.testing.assert_array_equal(sharpness.tokens_above(wide_NxE), sharpness.tokens_above(rows_NxE[[0, 2]]))
    np.testing.assert_array_equal(sharpness.tokens_for_mass(wide_NxE), sharpness.tokens_for_mass(rows_NxE[[0, 2]]))


def test_mean_does_not_depend_on_the_chunks():
    rows_NxV = np.random.default_rng(0).dirichlet(np.full(20, 0.2), size=12)
    whole, chunked = sharpness.SharpnessMean(), sharpness.SharpnessMean()
    whole.add(rows_NxV)
    for start, stop in ((0, 5), (5, 6), (6, 12)):
        chunked.add(rows_NxV[start:stop])
    assert whole.summary() == chunked.summary()
    assert whole.summary()["positions"] == 12
    expected = np.mean([counts_oracle(row.astype(np.float32))[1] for row in rows_NxV], axis=0)
    assert list(whole.summary()["tokens_for_mass"].values()) == pytest.approx(expected.tolist())
