"""What the documentation says of the quickstart is what a run of it measured.

docs/quickstart_metrics.json is the report/metrics.json of that run, without its curves. After a new one:

    jq 'del(.training, .curves, .breakdown, .sharpness, .seconds, .bytes, .peak_rss_bytes)' \\
        runs/quickstart/report/metrics.json > docs/quickstart_metrics.json
"""

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).parents[1]
RECORDED = json.loads((ROOT / "docs" / "quickstart_metrics.json").read_text())
NOISE = 5e-4  # of a figure: by so much two runs of the same commit on the same packages differ, and rounding beside it


def section(file, heading):
    """The text under a heading, up to the next one."""
    return (ROOT / file).read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]


def check(text, value):
    """Whether a printed number is the recorded value."""
    unit = 10.0 ** -len(text.partition(".")[2])
    assert abs(float(text) - value) <= 0.51 * unit + NOISE * abs(value), f"{text} is printed, {value} was measured"


def row(text, name):
    """The numbers of each cell of the row of a table."""
    [line] = [line for line in text.splitlines() if line.startswith(f"| {name} |")]
    return [re.findall(r"\d+(?:\.\d+)?", cell) for cell in line.split("|")[2:-1]]


def test_the_table_of_the_quickstart():
    text = section("docs/results.md", "The quickstart")
    controls = {name: control["perplexity"] for name, control in RECORDED["controls"].items()}
    perplexity = {
        split: measured | {name: control[split] for name, control in controls.items()}
        for split, measured in RECORDED["perplexity"].items()
    }
    intervals = RECORDED["interval"]["test"]
    for name, system in (
        ("base", "base"),
        ("base + memory", "augmented"),
        ("base + kNN (kNN-LM)", "knn_lm"),
        ("memory alone", "memory"),
        ("the base trained on for the memory's training FLOPs, 1.4 times its own", "continued"),
        ("base + memory, trained without the targets", "ce_only"),
    ):
        validation, test, ratio, interval, *_ = row(text, name)
        check(*validation, perplexity["validation"][system])
        check(*test, perplexity["test"][system])
        check(*ratio, perplexity["test"][system] / perplexity["test"]["base"])
        for printed, value in zip(interval, intervals.get(f"{system}_over_base", ()), strict=True):
            check(printed, value)
    for name, weight in (("base + memory", "memory"), ("base + kNN (kNN-LM)", "knn_lm")):
        check(*row(text, name)[-1], RECORDED["interpolation_weight"][weight])
    recall, total_variation = re.search(r"Recall@64 ([\d.]+), total variation ([\d.]+\d)", text).groups()
    check(recall, RECORDED["targets"]["recall_at_k"])
    check(total_variation, RECORDED["targets"]["total_variation"])
    base, positions = re.search(r"GPT-2 of ([\d,]+) parameters, .* \(([\d,]+) training positions", text).groups()
    assert int(base.replace(",", "")) == RECORDED["counts"]["parameters"]["base"]
    assert int(positions.replace(",", "")) == RECORDED["counts"]["tokens"]["train"]
    assert f"Python {RECORDED['provenance']['python']} " in text
    assert "no 13 words in a row" in text
    assert all(overlap["13"] == 0 for overlap in RECORDED["overlap"].values())


def test_the_row_of_the_readme():
    [line] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| quickstart: ")]
    pattern = (
        r"of ([\d,]+) parameters, .*? ([\d.]+) to ([\d.]+) \(([\d.]+), ([\d.]+) to ([\d.]+)\) at lambda ([\d.]+\d)"
    )
    parameters, base, augmented, ratio, low, high, weight = re.search(pattern, line).groups()
    assert int(parameters.replace(",", "")) == RECORDED["counts"]["parameters"]["base"]
    perplexity = RECORDED["perplexity"]["test"]
    check(base, perplexity["base"])
    check(augmented, perplexity["augmented"])
    check(ratio, perplexity["augmented"] / perplexity["base"])
    check(low, RECORDED["interval"]["test"]["augmented_over_base"][0])
    check(high, RECORDED["interval"]["test"]["augmented_over_base"][1])
    check(weight, RECORDED["interpolation_weight"]["memory"])


def test_what_pytorch_is_compared_with():
    text = section("docs/pytorch.md", "Verification")
    for name, system in (("base", "base"), ("memory alone", "memory"), ("base + memory", "augmented")):
        check(*row(text, name)[1], RECORDED["perplexity"]["test"][system])
