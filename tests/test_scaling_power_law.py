"""Power laws against the paper's published ones, against textbook formulas, and the coverage of their intervals."""

import math

import numpy as np
import pytest
import scipy.stats

from mlpmem_jax.scaling import bootstrap, exponents, power_law
from mlpmem_jax.scaling.points import Runs

# Figure 1 of the paper; its betas belong to N in billions.
PUBLISHED = {
    "wikitext": {"continued": (9.3e-8, -0.143), "augmented": (1.1e-6, -0.168)},
    "web": {"continued": (7.7e-5, -0.216), "augmented": (5.0e-4, -0.268)},
}
SIZES = {"continued": [124e6, 345e6, 774e6, 1558e6, 3.1e9], "augmented": [248e6, 710e6, 1.5e9, 3.1e9, 6.2e9]}


def runs_of(parameters_R, losses):
    parameters_R, losses = np.asarray(parameters_R, float), np.atleast_2d(np.asarray(losses).T).T
    means_R = losses.mean(axis=1)
    squares_R = np.square(losses - means_R[:, None]).sum(axis=1)
    seeds_R = np.full(len(means_R), losses.shape[1])
    return Runs(parameters_R, np.full(len(means_R), 1e9), 6e9 * parameters_R, means_R, seeds_R, squares_R)


def fit(parameters_R, losses, samples=4000, seed=0):
    generator = np.random.default_rng(seed)
    return power_law.fit(runs_of(parameters_R, losses), against="parameters", samples=samples, generator=generator)


def holds(interval, truth):
    return (interval["low"] is None or interval["low"] <= truth) and (
        interval["high"] is None or truth <= interval["high"]
    )


@pytest.mark.parametrize("corpus", PUBLISHED)
@pytest.mark.parametrize("arm", SIZES)
@pytest.mark.parametrize("task", [1.0, 1e-9])
def test_published_laws_without_noise(corpus, arm, task):
    beta, gamma = PUBLISHED[corpus][arm]
    sizes_R = np.array(SIZES[arm])
    actual = power_law.summary(fit(sizes_R, gamma * np.log(beta * task * sizes_R)), 0.95)
    assert actual["gamma"]["value"] == pytest.approx(gamma, abs=1e-6)
    assert actual["beta"]["value"] == pytest.approx(beta * task, rel=1e-6)
    assert holds(actual["gamma"], gamma)
    assert holds(actual["beta"], beta * task)
    assert actual["goodness"]["r_squared"] == pytest.approx(1.0)
    assert actual["leave_one_out"]["root_mean_square_error"] < 1e-9


def test_published_betas_belong_to_billions_of_parameters():
    beta, gamma = PUBLISHED["wikitext"]["continued"]
    assert (beta * 0.774) ** gamma == pytest.approx(10.42, rel=0.02)  # GPT2-large fine-tuned, as published


def test_gamma_is_textbook_regression_with_students_interval():
    generator = np.random.default_rng(3)
    log_sizes_R = np.log(np.geomspace(1e6, 1e9, 6))
    losses_R = 5.0 - 0.1 * log_sizes_R + 0.02 * generator.normal(size=6)
    actual = power_law.summary(fit(np.exp(log_sizes_R), losses_R, samples=200_000), 0.9)
    expected = scipy.stats.linregress(log_sizes_R, losses_R)
    half = scipy.stats.t.ppf(0.95, 4) * expected.stderr
    assert actual["gamma"]["value"] == pytest.approx(expected.slope, rel=1e-9)
    assert actual["gamma"]["low"] == pytest.approx(expected.slope - half, abs=0.02 * half)
    assert actual["gamma"]["high"] == pytest.approx(expected.slope + half, abs=0.02 * half)
    assert actual["beta"]["value"] == pytest.approx(math.exp(expected.intercept / expected.slope), rel=1e-6)
    assert actual["goodness"]["r_squared"] == pytest.approx(expected.rvalue**2)


def test_leave_one_out_is_a_refit_without_each_size():
    log_sizes_R, losses_R = np.log([1e6, 4e6, 9e6, 3e7]), np.array([4.0, 3.8, 3.75, 3.4])
    actual = power_law.leave_one_out(fit(np.exp(log_sizes_R), losses_R))
    errors = []
    for left_out in range(4):
        others = np.arange(4) != left_out
        line = scipy.stats.linregress(log_sizes_R[others], losses_R[others])
        predicted = line.intercept + line.slope * log_sizes_R[left_out]
        errors.append(math.exp(predicted - losses_R[left_out]) - 1.0)
    assert [prediction["error"] for prediction in actual["predictions"]] == pytest.approx(errors)
    assert actual["largest_error"] == pytest.approx(max(errors, key=abs))


def test_the_best_run_of_a_size_stands_for_it():
    runs = runs_of([1e6, 1e6, 2e6, 4e6, 8e6], np.array([4.0, 3.0, 2.9, 2.8, 2.7]))
    law = power_law.fit(runs, against="parameters", samples=100, generator=np.random.default_rng(0))
    assert np.exp(law.runs.losses_R[0]) == pytest.approx(math.exp(3.0))
    assert len(law.x_R) == 4


def test_perplexities_that_do_not_fall_have_an_unbounded_beta_and_no_comparison():
    flat = fit([1e6, 1e7, 1e8, 1e9], [3.0, 3.1, 2.95, 3.05])
    steep = fit([1e6, 1e7, 1e8, 1e9], [4.0, 3.5, 3.01, 2.5])
    assert power_law.summary(flat, 0.95)["beta"]["low"] is None
    actual = exponents.compare(("a", flat), ("b", steep), against="parameters", confidence=0.95)
    assert actual["gamma_ratio"]["low"] is actual["gamma_ratio"]["high"] is None
    assert actual["verdict"].startswith("The exponents cannot be compared: the perplexity of a does not clearly fall")


def test_equal_perplexities_everywhere_are_still_json():
    constant = fit([1e6, 1e7, 1e8], [3.0, 3.0, 3.0])
    assert power_law.summary(constant, 0.95)["beta"]["low"] is None
    actual = exponents.compare(("a", constant), ("b", constant), against="parameters", confidence=0.95)
    assert "cannot be compared" in actual["verdict"]


def test_lack_of_fit_compares_a_bend_with_the_seeds():
    log_sizes_R = np.log(np.geomspace(1e6, 1e8, 5))
    straight_R = 4.0 - 0.1 * log_sizes_R
    bent_R = straight_R + 0.01 * np.square(log_sizes_R - log_sizes_R.mean())
    of_seeds = 0.002 * np.random.default_rng(0).normal(size=(5, 3))
    probabilities = [
        power_law.goodness(fit(np.exp(log_sizes_R), losses_R[:, None] + of_seeds))["lack_of_fit_p"]
        for losses_R in (straight_R, bent_R)
    ]
    assert probabilities[0] > 0.05
    assert probabilities[1] < 1e-4
    generator = np.random.default_rng(1)
    under_the_law = [
        power_law.goodness(fit(np.exp(log_sizes_R), straight_R[:, None] + generator.normal(size=(5, 3)), samples=2))
        for _ in range(300)
    ]
    assert scipy.stats.kstest([actual["lack_of_fit_p"] for actual in under_the_law], "uniform").pvalue > 0.01


def test_ratio_is_fiellers_interval_and_the_verdict_follows_it():
    sizes_R, noise_R = np.geomspace(1e6, 1e8, 6), 0.004 * np.array([1.0, -1.0, 0.5, -0.5, 1.0, -1.0])
    laws = [fit(sizes_R, 6.0 + gamma * np.log(sizes_R) + noise_R) for gamma in (-0.1, -0.13)]
    actual = exponents.compare(("a", laws[0]), ("b", laws[1]), against="parameters", confidence=0.95)
    # Fieller's quadratic; equal scatters of equal designs leave Welch 4 + 4 degrees of freedom where r is about 1.
    gammas, variance = [law.gamma for law in laws], laws[0].line.covariance_IxI[1, 1]
    for r in (actual["gamma_ratio"]["low"], actual["gamma_ratio"]["high"]):
        degrees = 4 * (1 + r**2) ** 2 / (1 + r**4)
        t = (gammas[1] - r * gammas[0]) / math.sqrt(variance * (1 + r**2))
        assert 2 * scipy.stats.t.sf(abs(t), degrees) == pytest.approx(0.05, rel=1e-6)
    assert actual["verdict"].startswith("The data support a steeper exponent of b than of a")
    back = exponents.compare(("b", laws[1]), ("a", laws[0]), against="parameters", confidence=0.95)
    assert back["verdict"].startswith("The data support a shallower exponent of a than of b")
    assert back["gamma_ratio"]["low"] == pytest.approx(1.0 / actual["gamma_ratio"]["high"])
    same = exponents.compare(("a", laws[0]), ("a2", laws[0]), against="parameters", confidence=0.95)
    assert same["verdict"].startswith("The data do not support a difference")
    assert same["perplexity_ratio"]["value"] == pytest.approx(1.0)


@pytest.mark.parametrize(("sizes", "seeds"), [(3, 2), (5, 1), (5, 2), (8, 3)])
def test_intervals_of_500_sweeps_cover_the_published_laws(sizes, seeds):
    generator, sweeps = np.random.default_rng(sizes * 10 + seeds), 500
    laws, x_R = PUBLISHED["web"], np.geomspace(0.124, 3.0, sizes)
    truth = {"gamma_ratio": laws["augmented"][1] / laws["continued"][1]}
    covered = dict.fromkeys(("gamma", "beta", "gamma_ratio", "perplexity_ratio"), 0)
    for _ in range(sweeps):
        fitted = {}
        for arm, (beta, gamma) in laws.items():
            # What is peculiar to a size is shared by its seeds.
            noise = 0.01 * generator.normal(size=(sizes, 1)) + 0.01 * generator.normal(size=(sizes, seeds))
            losses = gamma * np.log(beta * x_R)[:, None] + noise
            fitted[arm] = power_law.fit(runs_of(x_R, losses), against="parameters", samples=1000, generator=generator)
        actual = power_law.summary(fitted["continued"], 0.95)
        actual |= exponents.compare(*fitted.items(), against="parameters", confidence=0.95)
        truth["perplexity_ratio"] = math.prod(
            (beta * x_R[-1]) ** (sign * gamma) for (beta, gamma), sign in zip(laws.values(), (-1, 1), strict=True)
        )
        truth["beta"], truth["gamma"] = laws["continued"]
        for name in covered:
            covered[name] += holds(actual[name], truth[name])
    for name, count in covered.items():
        assert abs(count / sweeps - 0.95) <= 0.03, (name, count / sweeps)


def test_bounds_of_draws_that_run_away_or_do_not_exist():
    drawn_B = np.concatenate([np.linspace(0.0, 1.0, 96), [np.nan] * 4])
    assert bootstrap.interval(0.5, drawn_B, 0.95) == {"value": 0.5, "low": None, "high": None}
    bounded = bootstrap.interval(0.5, drawn_B, 0.9)
    assert 0.0 <= bounded["low"] < 0.02
    assert 0.98 < bounded["high"] <= 1.0
    assert bootstrap.interval(math.inf, None, 0.9) == {"value": None, "low": None, "high": None}
