"""The bootstrap against plain loops, and its coverage on data whose true ratio is known."""

import numpy as np
import pytest

from mlpmem_jax.evaluation import bootstrap


def test_resampled_means_are_the_means_of_the_drawn_rows(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 30)  # several chunks, the last one short
    values_UxK = np.random.default_rng(0).normal(size=(7, 3))
    found_SxK = bootstrap.resampled_means(values_UxK, samples=10, seed=5)
    generator = np.random.default_rng(5)
    expected = []
    for rows in (4, 4, 2):
        for draw_U in generator.integers(7, size=(rows, 7)):
            expected.append(sum(values_UxK[unit] for unit in draw_U) / 7)
    np.testing.assert_allclose(found_SxK, expected, rtol=1e-12)


def test_interval_holds_the_ratio_and_narrows_with_confidence():
    generator = np.random.default_rng(1)
    base_UxT = -generator.gamma(4.0, size=(200, 16))
    better_UxT = base_UxT + 0.1 + 0.05 * generator.normal(size=base_UxT.shape)
    ratio = np.exp(np.mean(base_UxT) - np.mean(better_UxT))
    narrow, wide = (
        bootstrap.ratio_intervals(base_UxT, {"s": better_UxT}, samples=500, confidence=confidence, seed=0)["s"]
        for confidence in (0.5, 0.99)
    )
    assert wide[0] < narrow[0] < ratio < narrow[1] < wide[1] < 1.0


def test_a_constant_factor_has_an_interval_of_one_point_and_the_seed_decides_the_draws():
    base_UxT = -np.random.default_rng(2).gamma(4.0, size=(50, 8))
    systems = {"half": base_UxT - np.log(2.0), "same": base_UxT, "noisy": base_UxT * 1.1}
    found = bootstrap.ratio_intervals(base_UxT, systems, samples=200, confidence=0.95, seed=3)
    assert found["half"] == pytest.approx([2.0, 2.0], rel=1e-12)
    assert found["same"] == [1.0, 1.0]
    assert found == bootstrap.ratio_intervals(base_UxT, systems, samples=200, confidence=0.95, seed=3)
    other = bootstrap.ratio_intervals(base_UxT, systems, samples=200, confidence=0.95, seed=4)
    assert found["noisy"] != other["noisy"]


def test_coverage_when_positions_of_a_block_are_correlated():
    generator = np.random.default_rng(3)
    true_log_ratio, covered, covered_by_positions, trials = -0.05, 0, 0, 200
    for trial in range(trials):
        base_UxT = -generator.gamma(4.0, size=(60, 20))
        block_Ux1 = 0.3 * generator.normal(size=(60, 1))
        gain_UxT = -true_log_ratio + block_Ux1 + 0.3 * generator.normal(size=(60, 20))
        common = {"samples": 300, "confidence": 0.95, "seed": trial}
        low, high = bootstrap.ratio_intervals(base_UxT, {"s": base_UxT + gain_UxT}, **common)["s"]
        covered += low <= np.exp(true_log_ratio) <= high
        single = bootstrap.ratio_intervals(
            base_UxT.reshape(-1, 1), {"s": (base_UxT + gain_UxT).reshape(-1, 1)}, **common
        )["s"]
        covered_by_positions += single[0] <= np.exp(true_log_ratio) <= single[1]
    assert 0.90 <= covered / trials <= 0.985
    # Single positions as the unit would claim far too much certainty.
    assert covered_by_positions / trials < 0.6


@pytest.mark.parametrize(
    ("base", "system", "message"),
    [
        (np.zeros((1, 4)), np.zeros((1, 4)), "two blocks"),
        (np.zeros((3, 4)), np.zeros((4, 3)), "positions"),
        (np.zeros((3, 4)), np.full((3, 4), -np.inf), "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, system, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.ratio_intervals(base, {"s": system}, samples=10, confidence=0.95, seed=0)
