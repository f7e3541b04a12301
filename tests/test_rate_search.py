"""The search of a learning rate, with trainings whose perplexities are written down by hand."""

import json
import pathlib
import weakref

import ml_collections
import pytest

from mlpmem_jax.training import rate_search

SHORT = {1e-5: 9.0, 1e-4: 8.0, 1e-3: 7.0}
SETTINGS = ml_collections.ConfigDict(
    {"steps": 80, "warmup_steps": 50, "learning_rate": 0.0, "profile_steps": "3:5", "seed": 0}
)


class Parameters:
    """An object that a weak reference can tell is freed."""


class Trainer:
    """Writes down every run, and that no parameters of another run are held meanwhile."""

    def __init__(self, whole):
        self.whole, self.runs, self.held = whole, [], []

    def __call__(self, settings, name, folder):
        assert not any(reference() for reference in self.held)
        rate, is_short = settings.learning_rate, settings.steps < SETTINGS.steps
        self.runs.append((rate, settings.steps, settings.warmup_steps, settings.profile_steps))
        pathlib.Path(folder, "tensorboard").mkdir(parents=True, exist_ok=True)
        pathlib.Path(folder, "tensorboard", "events").write_text(folder)
        pathlib.Path(folder, "metrics.jsonl").write_text(json.dumps({"rate": rate}))
        parameters = Parameters()
        parameters.rate = rate
        self.held.append(weakref.ref(parameters))
        perplexity = (SHORT if is_short else self.whole)[rate]
        return parameters, {"steps": settings.steps, "validation": {"perplexity": perplexity}}


@pytest.mark.parametrize(("whole", "best"), [({1e-4: 6.0, 1e-3: 5.0}, 1e-3), ({1e-4: 5.0, 1e-3: 6.0}, 1e-4)])
def test_the_two_best_rates_of_short_runs_train_in_full(tmp_path, whole, best):
    train = Trainer(whole)
    parameters, summary = rate_search.best_of(
        tuple(SHORT), SETTINGS, train, name="continued", folder=str(tmp_path), flops_per_step=3
    )
    assert train.runs[:3] == [(rate, 10, 1, "") for rate in SHORT]
    assert train.runs[3:5] == [(rate, 80, 50, "3:5") for rate in (1e-4, 1e-3)]
    assert parameters.rate == best
    assert summary == {
        "steps": 80,
        "validation": {"perplexity": 5.0},
        "learning_rate": best,
        "rate_search": {"1e-05": 9.0, "0.0001": 8.0, "0.001": 7.0},
        "rate_finals": {f"{rate:g}": perplexity for rate, perplexity in whole.items()},
        "rate_search_flops": 3.0 * (3 * 10 + 80),
    }
    assert rate_search.total_steps(80, tuple(SHORT)) == 3 * 10 + 2 * 80
    kept = ["0.0001-whole", "0.0001.json", "0.001-whole", "0.001.json", "1e-05.json"]
    assert sorted(file.name for file in (tmp_path / "rates").iterdir()) == kept
    train.runs.clear()
    train.held.clear()
    rate_search.best_of(tuple(SHORT), SETTINGS, train, name="continued", folder=str(tmp_path), flops_per_step=3)
    assert {steps for _, steps, *_ in train.runs} == {80}
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"rate": best}
    assert (tmp_path / "tensorboard" / "events").read_text() == f"{tmp_path}/rates/{best:g}-whole"
    rate_search.remove_runs(str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_a_single_rate_trains_in_full(tmp_path):
    train = Trainer({1e-3: 5.0})
    _, summary = rate_search.best_of((1e-3,), SETTINGS, train, name="base", folder=str(tmp_path), flops_per_step=3)
    assert [run[:2] for run in train.runs] == [(1e-3, 10), (1e-3, 80)]
    assert summary["rate_search_flops"] == 3.0 * 10
    assert rate_search.total_steps(0, (1e-3,)) == 0
