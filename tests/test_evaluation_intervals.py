"""Intervals against the textbook's and dense linear algebra, and their coverage where the true ratio is known."""

import numpy as np
import pytest
import scipy.stats

from mlpmem_jax.evaluation import intervals


def rows(shape):
    """Every row a cluster."""
    return np.repeat(np.arange(shape[0]), shape[1]).reshape(shape)


def test_with_clusters_of_one_size_the_interval_is_students():
    generator = np.random.default_rng(0)
    base_UxT = -generator.gamma(4.0, size=(7, 5))
    system_UxT = base_UxT + generator.normal(0.1, 1.0, size=(7, 5))
    actual = intervals.ratio_intervals(base_UxT, {"s": system_UxT}, rows((7, 5)), confidence=0.9)["s"]
    of_clusters_U = (base_UxT - system_UxT).mean(axis=1)
    expected = scipy.stats.t.interval(0.9, 6, of_clusters_U.mean(), scipy.stats.sem(of_clusters_U))
    assert actual == pytest.approx(np.exp(expected).tolist(), rel=1e-12)


def test_error_and_freedom_are_those_of_dense_matrices():
    """CR2 and the Satterthwaite degrees of freedom, from their definitions with matrices of all clusters."""
    generator = np.random.default_rng(1)
    sizes_U = generator.integers(1, 60, size=9).astype(float)
    sums_U = generator.normal(size=9) * sizes_U
    ones = np.ones(9)
    residual_UxU = np.eye(9) - np.outer(sizes_U, ones) / sizes_U.sum()  # sums to residuals
    corrections_U = 1 / np.sqrt(1 - sizes_U / sizes_U.sum())
    to_residuals_UxU = corrections_U[:, None] * residual_UxU / sizes_U.sum()
    error = np.linalg.norm(to_residuals_UxU @ sums_U)
    values = np.linalg.eigvalsh(to_residuals_UxU @ np.diag(sizes_U**2) @ to_residuals_UxU.T)
    freedom = values.sum() ** 2 / (values**2).sum()
    expected = sums_U.sum() / sizes_U.sum(), error, freedom
    assert intervals.mean_of_clusters(sums_U, sizes_U) == pytest.approx(expected, rel=1e-10)
    assert freedom < 8


@pytest.mark.parametrize("clusters", [5, 10, 30, 100])
@pytest.mark.parametrize("spread", [0.0, 0.7], ids=["one size", "many sizes"])
def test_95_percent_intervals_cover(clusters, spread):
    """Gains of documents vary, their positions share them, and their lengths differ threefold and more."""
    generator, trials, true_gain, covered = np.random.default_rng(clusters), 3000, 0.05, 0
    for _ in range(trials):
        sizes_U = np.maximum(10, np.round(200 * np.exp(spread * generator.normal(size=clusters))))
        gains_U = true_gain + 0.2 * generator.normal(size=clusters)
        sums_U = sizes_U * gains_U + np.sqrt(sizes_U) * generator.normal(size=clusters)
        mean, error, freedom = intervals.mean_of_clusters(sums_U, sizes_U)
        covered += abs(mean - true_gain) <= scipy.stats.t.ppf(0.975, freedom) * error
    assert 0.92 <= covered / trials <= 0.98


def test_single_positions_as_clusters_would_claim_far_too_much_certainty():
    generator, trials, covered = np.random.default_rng(3), 200, 0
    for _ in range(trials):
        base_UxT = -generator.gamma(4.0, size=(20, 20))
        system_UxT = base_UxT + 0.05 + 0.3 * (generator.normal(size=(20, 1)) + generator.normal(size=(20, 20)))
        low, high = intervals.ratio_intervals(base_UxT, {"s": system_UxT}, np.arange(400), confidence=0.95)["s"]
        covered += low <= np.exp(-0.05) <= high
    assert covered / trials < 0.6


def test_interval_holds_the_ratio_and_widens_with_confidence():
    generator = np.random.default_rng(1)
    base_UxT = -generator.gamma(4.0, size=(200, 16))
    better_UxT = base_UxT + 0.1 + 0.05 * generator.normal(size=base_UxT.shape)
    ratio = np.exp(np.mean(base_UxT) - np.mean(better_UxT))
    narrow, wide = (
        intervals.ratio_intervals(base_UxT, {"s": better_UxT}, rows((200, 16)), confidence=confidence)["s"]
        for confidence in (0.5, 0.99)
    )
    assert wide[0] < narrow[0] < ratio < narrow[1] < wide[1] < 1.0


def test_a_constant_factor_has_an_interval_of_one_point():
    base_UxT = -np.random.default_rng(2).gamma(4.0, size=(50, 8))
    systems = {"half": base_UxT - np.log(2.0), "same": base_UxT}
    actual = intervals.ratio_intervals(base_UxT, systems, rows((50, 8)), confidence=0.95)
    assert actual["half"] == pytest.approx([2.0, 2.0], rel=1e-12)
    assert actual["same"] == [1.0, 1.0]


def test_documents_are_clusters_where_they_are_longer_than_sequences():
    long_SxT = np.array([[4, 4], [4, 4], [4, 9], [9, 9]])
    kind, clusters_SxT = intervals.clusters_of(long_SxT)
    assert kind == "document"
    assert clusters_SxT.tolist() == [[0, 0], [0, 0], [0, 1], [1, 1]]
    for other_SxT in (np.arange(8).reshape(4, 2), np.zeros((4, 2), int)):  # documents too short, or only one
        kind, clusters_SxT = intervals.clusters_of(other_SxT)
        assert kind == "sequence"
        assert clusters_SxT.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("base", "system", "clusters", "message"),
    [
        (np.zeros((1, 4)), np.zeros((1, 4)), np.zeros((1, 4), int), "two clusters"),
        (np.zeros((3, 4)), np.zeros((4, 3)), rows((3, 4)), "positions"),
        (np.zeros((3, 4)), np.full((3, 4), -np.inf), rows((3, 4)), "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, system, clusters, message):
    with pytest.raises(ValueError, match=message):
        intervals.ratio_intervals(base, {"s": system}, clusters, confidence=0.95)
