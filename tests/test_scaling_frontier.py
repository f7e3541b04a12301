"""Chinchilla's law from points of a known one, its solvers against each other, and the frontiers."""

import numpy as np
import pytest
import scipy.optimize
import scipy.special

from mlpmem_jax.scaling import chinchilla, frontier
from mlpmem_jax.scaling.points import Runs

LAW = {"E": 1.69, "A": 406.4, "B": 410.7, "a": 0.34, "b": 0.28}  # Hoffmann et al., arXiv 2203.15556
SETTINGS = {"confidence": 0.95, "samples": 200}


def runs_of(parameters_R, tokens_R, noise=0.0, seed=0):
    parameters_R, tokens_R = np.asarray(parameters_R), np.asarray(tokens_R)
    losses_R = LAW["E"] + LAW["A"] / parameters_R ** LAW["a"] + LAW["B"] / tokens_R ** LAW["b"]
    losses_R = losses_R * np.exp(noise * np.random.default_rng(seed).normal(size=len(losses_R)))
    ones_R = np.ones(len(losses_R), int)
    return Runs(parameters_R, tokens_R, 6.0 * parameters_R * tokens_R, losses_R, ones_R, 0.0 * losses_R)


def grid(sizes=5, tokens=4, **options):
    sizes_R = np.repeat(np.geomspace(44e6, 10e9, sizes), tokens)
    return runs_of(sizes_R, np.tile(np.geomspace(1e9, 5e11, tokens), sizes), **options)


def best_size(flops):
    """Equation 4 of Hoffmann et al."""
    a, b = LAW["a"], LAW["b"]
    return (a * LAW["A"] / (b * LAW["B"])) ** (1 / (a + b)) * (flops / 6) ** (b / (a + b))


def isoflop(budgets=5, sizes=7, spread=4.0, **options):
    flops = np.repeat(np.geomspace(6e18, 6e21, budgets), sizes)
    parameters_R = best_size(flops) * np.tile(np.geomspace(1 / spread, spread, sizes), budgets)
    return runs_of(parameters_R, flops / 6 / parameters_R, **options)


def generator():
    return np.random.default_rng(0)


@pytest.mark.parametrize("runs", [grid(), grid(3, 3), isoflop()], ids=["grid", "3x3", "isoflop"])
def test_five_coefficients_of_a_known_law(runs):
    assert chinchilla.absent(runs) is None
    actual = chinchilla.fit(runs, **SETTINGS, generator=generator())
    for name, truth in LAW.items():
        assert actual[name]["value"] == pytest.approx(truth, rel=0.001), name
        assert actual[name]["low"] <= truth <= actual[name]["high"], name
    assert actual["optimal_parameters"]["value"] == pytest.approx(0.28 / 0.62, rel=1e-3)
    assert actual["leave_one_out"]["root_mean_square_error"] < 1e-4


def test_five_coefficients_with_noise_lie_within_their_intervals():
    actual = chinchilla.fit(grid(6, 6, noise=0.003, seed=4), **SETTINGS, generator=generator())
    for name, truth in LAW.items():
        assert actual[name]["low"] < truth < actual[name]["high"], name
        assert actual[name]["low"] < actual[name]["value"] < actual[name]["high"], name
    assert actual["goodness"]["scatter"] == pytest.approx(0.003, rel=0.4)
    assert actual["leave_one_out"]["root_mean_square_error"] < 0.05


def test_one_run_that_went_wrong_hardly_moves_the_law():
    runs = grid(6, 5)
    runs.losses_R[13] *= 1.3
    actual = chinchilla.fit(runs, **SETTINGS, generator=generator())
    for name, truth in LAW.items():
        assert actual[name]["value"] == pytest.approx(truth, rel=0.02), name
    errors = [abs(prediction["error"]) for prediction in actual["leave_one_out"]["predictions"]]
    assert np.argmax(errors) == 13


def test_objective_is_hubers_loss_of_log_losses_and_its_gradient():
    runs = grid(noise=0.01)
    points, observed_R = chinchilla._Points(runs), np.log(runs.losses_R)
    search_5 = np.array([0.4, -0.5, 0.1, 0.3, 0.25])
    coefficients = points.coefficients(search_5)
    E, A, B, a, b = (float(coefficients[name]) for name in ("E", "A", "B", "a", "b"))
    residuals_R = np.log(E + A / runs.parameters_R**a + B / runs.tokens_R**b) - observed_R
    expected = np.sum(scipy.special.huber(1e-3, residuals_R)) / 1e-6
    assert points.objective(search_5, observed_R)[0] == pytest.approx(expected, rel=1e-9)
    numeric_5 = scipy.optimize.approx_fprime(search_5, lambda at_5: points.objective(at_5, observed_R)[0], 1e-8)
    np.testing.assert_allclose(points.objective(search_5, observed_R)[1], numeric_5, rtol=1e-3, atol=1.0)


def test_refits_of_many_draws_are_the_optima_of_lbfgs():
    points, generator = chinchilla._Points(grid()), np.random.default_rng(1)
    start_5 = points.fit(np.log(grid().losses_R))
    observed_BxR = points.log_losses(start_5) + 0.004 * generator.normal(size=(6, 20))
    counted_BxR = np.ones((6, 20))
    counted_BxR[5, 3] = 0.0
    refitted_Bx5 = points.refit(observed_BxR, counted_BxR, start_5)
    for draw in range(5):
        best = points.objective(points.fit(observed_BxR[draw]), observed_BxR[draw])[0]
        assert points.objective(refitted_Bx5[draw], observed_BxR[draw])[0] == pytest.approx(best, rel=1e-4)
    without = chinchilla._Points(grid().take(counted_BxR[5] > 0))
    expected = without.coefficients(without.fit(observed_BxR[5][counted_BxR[5] > 0]))
    actual = points.coefficients(refitted_Bx5[5])
    for name in LAW:
        assert actual[name] == pytest.approx(expected[name], rel=0.02), name


def test_runs_that_cannot_tell_the_coefficients_apart():
    assert "found 4 runs" in chinchilla.absent(grid(2, 2))
    sizes_R = np.geomspace(1e7, 1e9, 8)
    assert "size determines the number of tokens" in chinchilla.absent(runs_of(sizes_R, 20 * sizes_R))
    assert "size determines the number of tokens" in chinchilla.absent(runs_of(sizes_R, 1e21 / sizes_R))
    below_one = grid()
    below_one.losses_R[0] = -0.1
    assert "above 1" in chinchilla.absent(below_one)


@pytest.mark.slow
def test_intervals_of_chinchilla_cover_the_truth():
    sweeps, covered = 25, dict.fromkeys(LAW, 0)
    for sweep in range(sweeps):
        runs = grid(noise=0.005, seed=sweep)
        actual = chinchilla.fit(runs, confidence=0.9, samples=60, generator=np.random.default_rng(sweep))
        for name, truth in LAW.items():
            covered[name] += actual[name]["low"] <= truth <= actual[name]["high"]
    # 0.9 within three standard errors of 25 sweeps
    assert all(count / sweeps >= 0.72 for count in covered.values()), covered


@pytest.mark.parametrize("noise", [0.0, 0.002])
def test_isoflop_minima_are_the_best_sizes(noise):
    actual = frontier.isoflop(isoflop(noise=noise), confidence=0.95, samples=1000, generator=generator())
    assert [budget["inside"] for budget in actual["budgets"]] == [True] * 5
    for budget in actual["budgets"]:
        assert budget["parameters"]["value"] == pytest.approx(best_size(budget["flops"]), rel=0.2)
        tokens = budget["flops"] / 6 / budget["parameters"]["value"]
        assert budget["tokens"]["value"] == pytest.approx(tokens, rel=1e-6)
    for name, truth in (("optimal_parameters", 0.28 / 0.62), ("optimal_tokens", 0.34 / 0.62)):
        assert actual["exponents"][name]["value"] == pytest.approx(truth, abs=0.03)
        assert actual["exponents"][name]["low"] < truth < actual["exponents"][name]["high"]


def test_a_parabola_is_the_polynomial_fit_of_its_budget():
    runs = isoflop(budgets=1, noise=0.01)
    (budget,) = frontier.isoflop(runs, confidence=0.95, samples=50, generator=generator())["budgets"]
    c2, c1, c0 = np.polyfit(np.log(runs.parameters_R), runs.losses_R, 2)
    assert budget["parameters"]["value"] == pytest.approx(np.exp(-c1 / (2 * c2)), rel=1e-6)
    assert budget["perplexity"]["value"] == pytest.approx(np.exp(c0 - c1**2 / (4 * c2)), rel=1e-6)


def test_budgets_without_a_minimum_say_so():
    falling = isoflop().take(slice(None))
    falling.losses_R[:] = 5.0 - 0.1 * np.log(falling.parameters_R) - 0.001 * np.log(falling.parameters_R) ** 2
    actual = frontier.isoflop(falling, confidence=0.95, samples=50, generator=generator())
    assert actual["exponents"] is None
    assert not any(budget["inside"] for budget in actual["budgets"])
    assert actual["budgets"][0]["parameters"]["value"] is None


def test_isoflop_without_a_degree_of_freedom_has_no_intervals():
    actual = frontier.isoflop(isoflop(sizes=3), confidence=0.95, samples=50, generator=generator())
    assert actual["exponents"]["optimal_parameters"]["value"] == pytest.approx(0.28 / 0.62, abs=0.05)
    assert actual["exponents"]["optimal_parameters"]["low"] is None


def test_envelope_keeps_runs_that_none_of_less_compute_beats():
    runs = grid(noise=0.001)
    actual = frontier.envelope(runs, confidence=0.95, samples=1000, generator=generator())
    expected = [
        loss
        for flops, loss in sorted(zip(runs.flops_R, runs.losses_R, strict=True))
        if loss <= min(runs.losses_R[runs.flops_R <= flops * (1 + 1e-9)])
    ]
    assert np.log([run["perplexity"] for run in actual["runs"]]) == pytest.approx(expected)
    exponent = actual["exponents"]["optimal_parameters"]
    assert exponent["low"] < 0.28 / 0.62 < exponent["high"]


def test_envelope_of_runs_that_chose_nothing():
    sizes_R, settings = np.geomspace(1e7, 1e9, 5), {"confidence": 0.95, "samples": 10, "generator": generator()}
    own_budgets = runs_of(sizes_R, 20 * sizes_R, noise=0.2)
    assert "its own training budget" in frontier.envelope(own_budgets, **settings)["absent"]
    one_size = runs_of(np.full(5, 1e8), np.geomspace(1e9, 1e11, 5))
    assert "no run is beaten" in frontier.envelope(one_size, **settings)["absent"]
    assert "it has 2 runs" in frontier.envelope(isoflop(budgets=2), **settings)["absent"]
    assert "no training budget" in frontier.isoflop(grid(), **settings)["absent"]
