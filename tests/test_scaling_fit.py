"""From a file of points to fit.json and its pictures."""

import csv
import json
import xml.etree.ElementTree

import numpy as np
import pytest

from mlpmem_jax import cli
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.scaling import fit

LAWS = {"continued": (9.3e-17, -0.143), "augmented": (1.1e-15, -0.168)}  # WikiText-103, figure 1, N in ones
SETTINGS = {"samples": 500}


def write(path, rows, columns=("arm", "parameters", "tokens", "flops", "perplexity", "seed")):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def sizes_sweep(path, noise=0.01, laws=LAWS, sizes=5):
    generator = np.random.default_rng(0)
    rows = [
        [arm, n, 1e8, 6e8 * n, (beta * n) ** gamma * np.exp(noise * generator.normal()), seed]
        for arm, (beta, gamma) in laws.items()
        for n in np.geomspace(124e6, 6e9, sizes)
        for seed in (0, 1)
    ]
    return write(path, rows)


def budgets_sweep(path, isoflop=True):
    rows = []
    for arm, floor in (("continued", 1.69), ("augmented", 1.6)):
        for flops in np.geomspace(6e18, 6e21, 4):
            for n in np.geomspace(1, 16, 5) * (0.03 * (flops / 6) ** 0.46 if isoflop else 1e8):
                d = flops / 6 / n if isoflop else flops / 6e9
                loss = floor + 406.4 / n**0.34 + 410.7 / d**0.28
                rows.append([arm, n, d, 6 * n * d, np.exp(loss), 0])
    return write(path, rows)


def values(tree):
    """Every {value, low, high} of a JSON tree."""
    if isinstance(tree, dict):
        if "value" in tree:
            yield tree
        for each in tree.values():
            yield from values(each)
    elif isinstance(tree, list):
        for each in tree:
            yield from values(each)


def test_the_papers_laws_with_noise_lie_within_their_intervals(tmp_path):
    returned = fit.run(sizes_sweep(tmp_path / "p.csv"), tmp_path / "out", **SETTINGS)
    actual = json.loads((tmp_path / "out" / "fit.json").read_text())
    assert actual == returned
    for arm, (beta, gamma) in LAWS.items():
        law = actual["arms"][arm]["power_law"]
        assert law["gamma"]["low"] < gamma < law["gamma"]["high"]
        assert law["beta"]["low"] < beta < law["beta"]["high"]
        assert actual["arms"][arm]["chinchilla"] is None
        assert "numbers of tokens" in actual["arms"][arm]["chinchilla_absent"]
    comparison = actual["comparison"]
    assert (comparison["reference"], comparison["arm"]) == ("continued", "augmented")
    assert comparison["gamma_ratio"]["low"] < 0.168 / 0.143 < comparison["gamma_ratio"]["high"]
    assert comparison["equal_compute"]
    assert comparison["verdict"].startswith("The data ")
    assert all(each["low"] is None or each["low"] <= each["value"] <= each["high"] for each in values(actual))


def test_the_papers_laws_without_noise(tmp_path):
    actual = fit.run(sizes_sweep(tmp_path / "p.csv", noise=0.0), tmp_path / "out", **SETTINGS)
    for arm, (beta, gamma) in LAWS.items():
        assert actual["arms"][arm]["power_law"]["gamma"]["value"] == pytest.approx(gamma, abs=1e-6)
        assert actual["arms"][arm]["power_law"]["beta"]["value"] == pytest.approx(beta, rel=1e-4)
    assert actual["comparison"]["gamma_ratio"]["value"] == pytest.approx(0.168 / 0.143, rel=1e-6)
    assert "support a steeper exponent of augmented" in actual["comparison"]["verdict"]


@pytest.mark.parametrize("isoflop", [True, False])
def test_budgets_bring_chinchillas_law_the_frontier_and_its_picture(tmp_path, isoflop):
    actual = fit.run(budgets_sweep(tmp_path / "p.csv", isoflop), tmp_path / "out", **SETTINGS)
    for name, truth in {"E": 1.6, "A": 406.4, "B": 410.7, "a": 0.34, "b": 0.28}.items():
        assert actual["arms"]["augmented"]["chinchilla"][name]["value"] == pytest.approx(truth, rel=0.02)
    assert ("budgets" in actual["arms"]["augmented"]["frontier"]["isoflop"]) == isoflop
    assert actual["arms"]["augmented"]["frontier"]["envelope"]["exponents"]["optimal_parameters"]["value"] > 0
    pictures = {"fit.svg", "fit.png", "frontier.svg", "frontier.png"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == pictures | {"fit.json"}
    for name in pictures:
        content = (tmp_path / "out" / name).read_bytes()
        if name.endswith("svg"):
            assert xml.etree.ElementTree.fromstring(content).tag.endswith("svg")
        else:
            assert content.startswith(b"\x89PNG")
    fit.run(sizes_sweep(tmp_path / "q.csv"), tmp_path / "out", **SETTINGS)
    assert not (tmp_path / "out" / "frontier.svg").exists()  # it would show other points


def test_the_same_points_give_the_same_bytes_and_another_seed_other_draws(tmp_path):
    points = sizes_sweep(tmp_path / "p.csv")
    for name, seed in (("one", 0), ("two", 0), ("three", 1)):
        fit.run(points, tmp_path / name, seed=seed, **SETTINGS)
    files = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert files == ["fit.json", "fit.png", "fit.svg"]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / "fit.json").read_bytes() != (tmp_path / "three" / "fit.json").read_bytes()


def test_one_arm_has_nothing_to_be_compared_with(tmp_path):
    law = {"any $arm$": (9.3e-17, -0.143)}
    actual = fit.run(sizes_sweep(tmp_path / "p.csv", laws=law, sizes=3), tmp_path / "out", **SETTINGS)
    assert actual["comparison"] is None
    assert actual["further_comparisons"] == []


def test_many_arms_are_all_compared_with_the_continued_one(tmp_path):
    laws = {f"alpha_{n}": (9.3e-17, -0.14 - 0.01 * n) for n in range(7)} | LAWS
    actual = fit.run(sizes_sweep(tmp_path / "p.csv", laws=laws), tmp_path / "out", **SETTINGS)
    assert (actual["comparison"]["reference"], actual["comparison"]["arm"]) == ("continued", "augmented")
    assert [each["arm"] for each in actual["further_comparisons"]] == [f"alpha_{n}" for n in range(7)]


def test_perplexities_unlike_any_law_still_give_a_report(tmp_path):
    rows = [[arm, n, 1e9, 6e9 * n, p, 0] for arm in "ab" for n, p in ((1e6, 9.0), (2e6, 9.0), (4e6, 9.0))]
    assert fit.run(write(tmp_path / "p.csv", rows), tmp_path / "out", **SETTINGS)["comparison"]["gamma_ratio"]
    rows = [[arm, n, 1e9, 6e9 * n, p, 0] for arm in "ab" for n, p in ((1e6, 9e9), (2e6, 2.0), (4e6, 8e7))]
    fit.run(write(tmp_path / "p.csv", rows), tmp_path / "out", **SETTINGS)


def test_unequal_compute_and_perplexities_below_one_are_said(tmp_path):
    rows = [[arm, n, 1e9, c * n, (1e-8 * n) ** -0.2, 0] for arm, c in (("a", 6e9), ("b", 9e9)) for n in (1e6, 1e7, 1e9)]
    verdict = fit.run(write(tmp_path / "p.csv", rows), tmp_path / "out", **SETTINGS)["comparison"]["verdict"]
    assert "did not spend the same training compute" in verdict
    assert "Perplexities of a are below 1" in verdict


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"against": "tokens"}, "against='tokens'"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"samples": 100}, "needs at least 400 bootstrap replicates"),
    ],
)
def test_options_that_cannot_be(tmp_path, options, words):
    points = sizes_sweep(tmp_path / "p.csv")
    with pytest.raises(UserError, match=words):
        fit.run(points, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_law_in_compute(tmp_path):
    rows = [["a", 1e9, c / 6e9, c, 30 * (c / 1e18) ** -0.05, s] for c in (1e18, 3e18, 1e19, 3e19) for s in (0, 1)]
    actual = fit.run(write(tmp_path / "p.csv", rows), tmp_path / "out", against="flops", **SETTINGS)
    assert actual["arms"]["a"]["power_law"]["gamma"]["value"] == pytest.approx(-0.05)


def test_the_command_reads_points_or_the_workdir_of_a_sweep(tmp_path, capsys):
    sizes_sweep(tmp_path / "points.csv")
    for number, source in enumerate((f"--points={tmp_path / 'points.csv'}", f"--runs={tmp_path}")):
        cli.main(["fit", source, f"--output={tmp_path / str(number)}"])
        assert {path.name for path in (tmp_path / str(number)).iterdir()} == {"fit.json", "fit.png", "fit.svg"}
    for words, message in (
        ([f"--runs={tmp_path / '0'}"], "has no points.csv"),
        ([f"--points={tmp_path / 'none.csv'}"], "no such file; expected a CSV file of points"),
        ([f"--points={tmp_path / 'points.csv'}", "--against=flops", "--bins=3"], "--bins=3: unknown option"),
    ):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["fit", *words, f"--output={tmp_path / 'refused'}"])
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
