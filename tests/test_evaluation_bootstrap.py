"""The bootstrap against plain loops, and its coverage on data whose true ratio is known."""

import numpy as np
import pytest

from mlpmem_jax.evaluation import bootstrap

SETTINGS = {"samples": 300, "confidence": 0.95, "seed": 0}


def rows(shape):
    """Every row a unit."""
    return np.repeat(np.arange(shape[0]), shape[1]).reshape(shape)


def test_resampled_means_are_the_means_of_the_drawn_rows(monkeypatch):
    monkeypatch.setattr(bootstrap, "DRAWS_AT_ONCE", 30)  # several chunks, the last one short
    values_UxK = np.random.default_rng(0).normal(size=(7, 3))
    found_SxK = bootstrap.resampled_means(values_UxK, samples=10, seed=5)
    generator = np.random.default_rng(5)
    expected = []
    for count in (4, 4, 2):
        for draw_U in generator.integers(7, size=(count, 7)):
            expected.append(sum(values_UxK[unit] for unit in draw_U) / 7)
    np.testing.assert_allclose(found_SxK, expected, rtol=1e-12)


def test_intervals_are_quantiles_of_ratios_over_drawn_documents_of_any_length():
    generator = np.random.default_rng(6)
    units_N = np.sort(generator.integers(9, size=200))
    base_N = -generator.gamma(4.0, size=200)
    system_N = base_N + generator.normal(size=200)
    found = bootstrap.ratio_intervals(base_N, {"s": system_N}, units_N, **SETTINGS)["s"]
    ratios = []
    for draw_U in np.random.default_rng(0).integers(9, size=(300, 9)):
        chosen = np.concatenate([np.flatnonzero(units_N == unit) for unit in draw_U])
        ratios.append(np.exp(-system_N[chosen].mean()) / np.exp(-base_N[chosen].mean()))
    assert found == pytest.approx(np.quantile(ratios, [0.025, 0.975]).tolist(), rel=1e-9)


def test_interval_holds_the_ratio_and_widens_with_confidence():
    generator = np.random.default_rng(1)
    base_UxT = -generator.gamma(4.0, size=(200, 16))
    better_UxT = base_UxT + 0.1 + 0.05 * generator.normal(size=base_UxT.shape)
    ratio = np.exp(np.mean(base_UxT) - np.mean(better_UxT))
    narrow, wide = (
        bootstrap.ratio_intervals(
            base_UxT, {"s": better_UxT}, rows((200, 16)), samples=500, confidence=confidence, seed=0
        )["s"]
        for confidence in (0.5, 0.99)
    )
    assert wide[0] < narrow[0] < ratio < narrow[1] < wide[1] < 1.0


def test_a_constant_factor_has_an_interval_of_one_point_and_the_seed_decides_the_draws():
    base_UxT = -np.random.default_rng(2).gamma(4.0, size=(50, 8))
    systems = {"half": base_UxT - np.log(2.0), "same": base_UxT, "noisy": base_UxT * 1.1}
    found = bootstrap.ratio_intervals(base_UxT, systems, rows((50, 8)), **SETTINGS)
    assert found["half"] == pytest.approx([2.0, 2.0], rel=1e-12)
    assert found["same"] == [1.0, 1.0]
    assert found == bootstrap.ratio_intervals(base_UxT, systems, rows((50, 8)), **SETTINGS)
    other = bootstrap.ratio_intervals(base_UxT, systems, rows((50, 8)), **{**SETTINGS, "seed": 4})
    assert found["noisy"] != other["noisy"]


def test_coverage_when_positions_of_a_document_are_correlated():
    generator = np.random.default_rng(3)
    true_log_ratio, covered, covered_by_positions, trials = -0.05, 0, 0, 120
    for trial in range(trials):
        base_UxT = -generator.gamma(4.0, size=(60, 20))
        document_Ux1 = 0.3 * generator.normal(size=(60, 1))
        gain_UxT = -true_log_ratio + document_Ux1 + 0.3 * generator.normal(size=(60, 20))
        system, settings = {"s": base_UxT + gain_UxT}, {**SETTINGS, "samples": 200, "seed": trial}
        low, high = bootstrap.ratio_intervals(base_UxT, system, rows((60, 20)), **settings)["s"]
        covered += low <= np.exp(true_log_ratio) <= high
        low, high = bootstrap.ratio_intervals(base_UxT, system, np.arange(1200), **settings)["s"]
        covered_by_positions += low <= np.exp(true_log_ratio) <= high
    assert 0.90 <= covered / trials <= 0.985
    # Single positions as the unit would claim far too much certainty.
    assert covered_by_positions / trials < 0.6


def test_documents_are_drawn_where_they_are_longer_than_sequences():
    long_SxT = np.array([[4, 4], [4, 4], [4, 9], [9, 9]])
    unit, units_SxT = bootstrap.coarsest_units(long_SxT)
    assert unit == "document"
    assert units_SxT.tolist() == [[0, 0], [0, 0], [0, 1], [1, 1]]
    for other_SxT in (np.arange(8).reshape(4, 2), np.zeros((4, 2), int)):  # documents too short, or only one
        unit, units_SxT = bootstrap.coarsest_units(other_SxT)
        assert unit == "sequence"
        assert units_SxT.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]


@pytest.mark.parametrize(
    ("base", "system", "units", "message"),
    [
        (np.zeros((1, 4)), np.zeros((1, 4)), np.zeros((1, 4), int), "two units"),
        (np.zeros((3, 4)), np.zeros((4, 3)), rows((3, 4)), "positions"),
        (np.zeros((3, 4)), np.full((3, 4), -np.inf), rows((3, 4)), "finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(base, system, units, message):
    with pytest.raises(ValueError, match=message):
        bootstrap.ratio_intervals(base, {"s": system}, units, samples=10, confidence=0.95, seed=0)
