"""The report: what it claims, what its page holds, and that it is written whole or not at all."""

import html.parser
import io
import json
import re

import numpy as np
import pytest

from mlpmem_jax.evaluation import breakdown, figures, perplexities, report, wording
from mlpmem_jax.evaluation.page import page
from mlpmem_jax.evaluation.sharpness import SharpnessMean


def metrics_of(gain, controls=False, records=True):
    """A whole metrics.json from random scores; `gain` is what the memory adds to the base, in nats."""

    def scores(seed):
        generator = np.random.default_rng(seed)
        base_SxT = -generator.gamma(2.0, size=(40, 8)) - 1.0
        noise_SxT = 0.05 * generator.normal(size=base_SxT.shape)
        others = {"continued": base_SxT + 0.2 * gain} if controls else {}
        memories = {"ce_only": base_SxT + 2 * gain} if controls else {}
        return perplexities.Scores(
            base_SxT, base_SxT + gain + noise_SxT, base_SxT + 0.3, np.zeros((40, 8), int), memories, others
        )

    metrics = perplexities.compare(scores(0), scores(1), confidence=0.95)
    mixed = perplexities.mixtures(scores(1), metrics["interpolation_weight"])
    base_N, clusters_N = mixed.pop("base").ravel(), np.arange(320) // 8
    systems = {name: scores_SxT.ravel() for name, scores_SxT in mixed.items()}
    values_N = 10.0 ** (np.arange(320) % 7 - 1) // 1
    edges = {
        "token_count": breakdown.TOKEN_COUNTS,
        "context_count": breakdown.CONTEXT_COUNTS,
        "base_entropy": breakdown.ENTROPIES,
    }
    gains = {
        name: breakdown.gains_by(values_N, edge, base_N, systems, clusters_N, confidence=0.95)
        for name, edge in edges.items()
    }
    shape = SharpnessMean()
    shape.add(np.random.default_rng(2).dirichlet(np.ones(30), size=5))
    names = ("base", "knn", "memory", "augmented")
    losses = [{"step": step, "loss": 5.0, "kl": 3.0, "cross_entropy": 6.0, "utilization": 0.6} for step in (20, 40)]
    validations = [{"step": step, "validation/perplexity": 50.0 - step / 10} for step in (20, 40)]
    return metrics | {
        "confidence": 0.95,
        "compute_dtype": "float32",
        "controls_left_out": {},
        "breakdown": {**gains, "counted_tokens": 900},
        "overlap": {"validation": {"13": 0.01, "25": 0.0}, "test": {"13": 0.0234}},
        "search_curve": [
            {"leaves_to_search": 16, "reorder": 2.504, "bytes_read": 1000, "recall": 0.9, "total_variation": 0.125}
        ],
        "sharpness": dict.fromkeys(names, shape.summary()),
        "targets": {"backend": "exact", "k": 8, "recall_at_k": 1.0, "temperature": 2.5},
        "counts": {
            "sequence_length": 8,
            "vocabulary": 30,
            "tokens": {"train": 900, "validation": 320, "test": 320},
            "parameters": {"base": 4000, "memory": 2_500_000},
        },
        "seconds": {"tokens": 1.0, "train": 2.0},
        "peak_rss_bytes": {"tokens": 2**30, "train": 2**31},
        "bytes": {"tokens": 100, "datastore/train": 200, "memory": 300},
        "training": {"base": validations, "memory": losses + validations} if records else {},
        "training_runs": {"base": {"steps": 40, "step": 40}, "memory": {"steps": 40, "step": 20}},
        "control_runs": {},
        "config": {"corpus": {"source": "files", "path": "texts/<odd> & name", "name": ""}},
        "provenance": {"python": "3"},
    }


@pytest.fixture(scope="module")
def plain_page():
    return page(metrics_of(0.1))


def test_a_gain_is_claimed_only_where_the_interval_excludes_one():
    metrics = metrics_of(0.1)
    first, second, third = wording.verdict(metrics)
    of, weight = metrics["perplexity"]["test"], metrics["interpolation_weight"]
    assert first.startswith("A memory of 2.5 million parameters with a base LM of 4,000 lowers test perplexity ")
    assert f"from {of['base']:.2f} to {of['augmented']:.2f} at λ {weight['memory']:.2f}" in first
    assert f"{of['memory']:.2f}" in second
    assert f"(kNN-LM) reaches {of['knn_lm']:.2f}; " in third
    no_gain = metrics_of(0.1)
    no_gain["interval"]["test"]["augmented_over_base"] = [0.95, 1.0]
    said = wording.verdict(no_gain)
    assert said[0].startswith("No gain can be claimed")
    assert "kNN-LM" not in " ".join(said)
    worse = metrics_of(0.1)
    worse["interval"]["test"]["augmented_over_base"] = [1.01, 1.05]
    assert "worse" in wording.verdict(worse)[0]


def test_a_memory_that_replaced_the_base_is_called_that():
    metrics = metrics_of(0.1)
    metrics["interpolation_weight"]["memory"] = 0.95
    assert "replaces the base rather than helping it: alone it reaches" in wording.verdict(metrics)[1]
    metrics["interpolation_weight"]["memory"] = 0.9
    assert "replaces the base" not in " ".join(wording.verdict(metrics))


def test_test_text_that_repeats_training_text_is_named():
    metrics = metrics_of(0.1)
    assert "13-word runs" not in " ".join(wording.verdict(metrics))
    metrics["overlap"]["test"]["13"] = 0.14
    assert "14 % of the test split's words are in 13-word runs" in wording.verdict(metrics)[-1]


def test_what_finding_a_learning_rate_cost_is_said(plain_page):
    metrics = metrics_of(0.1)
    assert "found by other runs" not in plain_page
    metrics["control_runs"] = {
        "continued": {"learning_rate": 3e-5, "rate_search_flops": 3.75e11, "training_flops": 1e12},
        "ce_only": {"training_flops": 1e12},
    }
    said = "the learning rate 3e-05 was found by other runs that took 3.8e+11 FLOPs, on top of 1e+12 for the"
    text = page(metrics)
    assert said in text
    assert text.count("found by other runs") == 1


def test_few_documents_are_said_to_say_little():
    metrics = metrics_of(0.1)
    assert "too few" not in " ".join(wording.verdict(metrics))
    metrics["interval"] |= {"cluster": "document", "clusters": 3}
    assert "only 3 documents, too few" in wording.verdict(metrics)[-1]


@pytest.mark.parametrize(
    ("interval", "words", "cell"),
    [
        ([0.8, 0.99], "better than", "yes"),
        ([0.9, 1.1], "not shown to differ from", "not shown"),
        ([1.01, 1.2], "worse than", "no"),
    ],
)
def test_how_the_memory_compares_with_a_control_is_said(interval, words, cell):
    metrics = metrics_of(0.1, controls=True)
    for control in metrics["controls"].values():
        control["interval_of_augmented_over_it"] = [0.5, 0.6]
    control = metrics["controls"]["ce_only"]
    control["interval_of_augmented_over_it"] = interval
    of_control = f"the same memory trained without kNN targets ({control['perplexity']['test']:.2f})"
    said = " ".join(wording.verdict(metrics))
    assert f"{'and than' if cell == 'yes' else f'The mixture is {words}'} {of_control}." in said
    assert "The mixture is better than the base trained further with the memory's training compute" in said
    assert re.search(rf"{interval[0]:.3f} to {interval[1]:.3f}</td><td[^>]*>{cell}</td>", page(metrics))


@pytest.mark.parametrize(
    ("interval", "verb"),
    [([0.9, 0.98], "lowers"), ([0.9, 1.1], "is not shown to change"), ([1.02, 1.1], "raises")],
)
def test_whether_the_memory_adds_to_a_base_that_was_trained_on_is_said(interval, verb):
    metrics = metrics_of(0.1, controls=True)
    metrics["controls"]["continued"]["with_memory"] |= {
        "perplexity": {"validation": 1.0, "test": 5.0},
        "interpolation_weight": 0.125,
        "interval_over_it": interval,
    }
    said = wording.verdict(metrics)[-1]
    assert said.startswith(
        f"Mixed with the base trained further with the memory's training compute instead, the same memory {verb}"
    )
    assert "to 5.00 at λ 0.12 (ratio" in said
    assert said in html.unescape(page(metrics))


def test_page_names_controls_that_were_left_out_and_shows_overlap_search_and_dtype():
    metrics = metrics_of(0.1)
    metrics["controls_left_out"] = {"continued": "/w/controls/continued: was trained for another memory"}
    text = page(metrics)
    assert "Left out, not a control of this memory: /w/controls/continued: was trained for another memory" in text
    assert "<td>2.34 %</td>" in text
    assert "<td>16</td><td>2.5</td><td>1,000</td><td>0.9</td><td>0.125</td>" in text
    assert "scored in float32" in text


@pytest.mark.parametrize(
    ("row", "name", "text"),
    [
        ((0, 1), "token_count", "0"),
        ((0, 1), "base_entropy", "0-1"),
        ((2, 5), "context_count", "2-4"),
        ((100, 1000), "token_count", "100-999"),
        ((1000, 10_000), "token_count", "1k-10k"),
        ((100_000, None), "token_count", "≥ 100k"),
    ],
)
def test_bins_are_named(row, name, text):
    assert figures.bin_label(dict(zip(("from", "below"), row, strict=True)), name) == text


class Parsed(html.parser.HTMLParser):
    """Checks that tags are balanced, and collects ids and references."""

    VOID = ("meta", "path", "use")

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.tags = [], [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href"):
                self.references.append(value)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("controls", [False, True])
def test_page_is_well_formed_and_needs_nothing_from_elsewhere(plain_page, controls):
    text = page(metrics_of(0.1, controls=True)) if controls else plain_page
    parsed = Parsed(text)
    assert parsed.open == []
    assert "script" not in parsed.tags
    assert "link" not in parsed.tags
    assert len(parsed.ids) == len(set(parsed.ids))
    assert all(reference.startswith("#") and reference[1:] in parsed.ids for reference in parsed.references)
    assert all(target in parsed.ids for target in re.findall(r"url\(#([^)]+)\)", text))
    assert "&lt;odd&gt; &amp; name" in text
    assert "<odd>" not in text


def test_page_does_without_training_records_and_costs_of_other_stages():
    metrics = metrics_of(0.1, records=False)
    metrics["seconds"], metrics["peak_rss_bytes"] = {"evaluate": 1.0}, {"evaluate": 2**20}
    assert Parsed(page(metrics)).open == []


def test_the_same_metrics_give_the_same_page_and_picture(plain_page):
    assert page(metrics_of(0.1)) == plain_page
    assert figures.overview(metrics_of(0.1)) == figures.overview(metrics_of(0.1))


def test_report_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    metrics = metrics_of(0.1, controls=True)
    folder = report.write(tmp_path / "report", metrics)
    assert sorted(file.name for file in folder.iterdir()) == [
        "breakdown.png",
        "index.html",
        "metrics.json",
        "overview.png",
    ]
    assert json.loads((folder / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    assert (folder / "overview.png").read_bytes().startswith(b"\x89PNG")
    before = (folder / "metrics.json").read_bytes()

    def fail(*_):
        raise OSError("no space left")

    monkeypatch.setattr(report, "page", fail)
    with pytest.raises(OSError, match="no space"):
        report.write(tmp_path / "report", metrics_of(0.5))
    assert (folder / "metrics.json").read_bytes() == before


def test_bars_of_a_system_far_beyond_the_base_stay_in_the_picture():
    metrics = metrics_of(0.1)
    metrics["perplexity"]["test"]["memory"] = 1e6
    figure = figures.perplexities(metrics)
    assert figure.axes[0].get_xlim()[1] < 3 * metrics["perplexity"]["test"]["base"]
    figure.savefig(io.BytesIO(), format="png", dpi=20)


@pytest.mark.parametrize(
    ("value", "text"), [(0.00123, "0.00123"), (7, "7"), (12.34, "12.3"), (256.4, "256"), (123456, "123,456")]
)
def test_quantities_are_short(value, text):
    assert wording.quantity(value) == text
