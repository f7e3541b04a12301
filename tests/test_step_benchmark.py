"""The benchmark's step is the reference's: same losses as PyTorch's autograd and AdamW give, step after step."""

import json
import re

import jax
import numpy as np
import pytest

from configs import default
from mlpmem_jax import accelerator_benchmark, benchmark
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.training import step_benchmark
from mlpmem_jax.training.step_benchmark import Case

CASES = [
    Case(MemoryConfig("gpt2", 300, 384, 16, 32, 2, 64), positions=32, entries=8),
    Case(MemoryConfig("llama", 256, 256, 32, 32, 2, 64), positions=32, micro_batches=2, entries=8),
]


def settings():
    training = default.get_config().training
    training.update({"learning_rate": 0.01, "beta2": 0.999, "schedule": "constant", "loss_chunk": 16})
    return training


@pytest.mark.parametrize("case", CASES, ids=["gpt2", "llama"])
def test_both_steps_lower_the_same_loss(case):
    pytest.importorskip("torch")
    ours = step_benchmark.jax_step(case, settings())
    theirs = step_benchmark.torch_step(case, ours.parameters, learning_rate=0.01)
    losses = np.array([[step.run() for step in (ours, theirs)] for _ in range(4)])
    assert losses[-1, 0] < losses[0, 0] - 0.1
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)


def test_a_comparison_of_different_computations_is_refused(monkeypatch):
    pytest.importorskip("torch")
    torch_step = step_benchmark.torch_step

    def other(case, parameters):
        return torch_step(case, jax.tree.map(lambda array: 10 * array, parameters))

    monkeypatch.setattr(step_benchmark, "torch_step", other)
    with pytest.raises(UserError, match=r"row: the first loss is .* in JAX and .* in PyTorch"):
        step_benchmark.compared_row("row", CASES[0], settings())


def test_a_row_compares_both_in_turn(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(step_benchmark, "_ROUNDS", 1)
    compared = step_benchmark.compared_row("row", CASES[1], settings())
    ours, theirs = (float(rate) for rate in re.findall(r"([\d,.]+) positions/s", compared["detail"].replace(",", "")))
    assert compared["value"] == pytest.approx(ours / theirs, rel=0.02)
    assert compared["unit"] == "x PyTorch's rate"


def test_rows_of_an_accelerator(tmp_path, monkeypatch):
    """But for what is tested above and in test_generation."""
    monkeypatch.setattr(accelerator_benchmark.step_benchmark, "compared_row", lambda name, *_: row(name))
    monkeypatch.setattr(accelerator_benchmark.generation, "rows", lambda *_, **sizes: [row(f"after {sizes['prompt']}")])
    file = tmp_path / "made" / "rows.json"
    rows = benchmark.run(default.get_config(), ["accelerator"], str(file))
    assert [one["name"] for one in rows] == [
        "train step, memory of small",
        "train step, memory of small, Llama",
        "exact search, 4,096 keys of width 32, k 16",
        "after 32",
    ]
    assert all(np.isfinite(one["value"]) and one["value"] > 0 for one in rows)
    assert json.loads(file.read_text())["rows"] == rows
    assert "accelerator" in benchmark._ON_REQUEST


def row(name):
    return {"name": name, "value": 1.0, "unit": "", "detail": ""}
