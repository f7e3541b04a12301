import jax
import numpy as np
import pytest
import torch
import transformers
from test_forward_benchmark import SMALL

from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.inference import batch_benchmark
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, prepare
from mlpmem_jax.interop import huggingface
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval import forward_benchmark


@pytest.mark.slow
def test_every_case_has_a_row_with_both_libraries(monkeypatch):
    monkeypatch.setattr(forward_benchmark, "MODELS", SMALL)
    monkeypatch.setattr(
        batch_benchmark, "MEMORIES", {name: MemoryConfig("gpt2", 64, 64, 16, 16, 1, 32) for name in SMALL}
    )
    monkeypatch.setattr(batch_benchmark, "CASES", ((1, 8), (3, 16)))
    monkeypatch.setattr(batch_benchmark, "COUNT", 4)
    monkeypatch.setattr(batch_benchmark, "ROUNDS", 1)
    rows = list(batch_benchmark.rows(None))
    assert [row["name"] for row in rows][::2] == [
        f"next token, {name} with memory, batch 1, prompt of 8" for name in ("gpt2", "llama")
    ]
    assert len(rows) == 4
    assert all(row["value"] > 0 and "in transformers" in row["detail"] for row in rows)


@pytest.mark.parametrize("family", SMALL)
def test_both_libraries_take_the_same_steps(family, tmp_path, monkeypatch):
    """From the same weights the last of the generated tokens is the same, also when a call is repeated."""
    monkeypatch.setattr(batch_benchmark, "COUNT", 6)
    torch.manual_seed(0)
    theirs = forward_benchmark.causal_model(transformers, SMALL[family])
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)  # different contexts have clearly different next tokens
    theirs.save_pretrained(tmp_path)
    parameters, model = huggingface.load_language_model(tmp_path, Sharding(make_mesh(devices=jax.devices()[:1])))
    tokens_BxT = np.random.default_rng(1).integers(0, 64, (2, 9), dtype=np.int32)
    ours = batch_benchmark._steps(DecoderConfig(model), prepare(Parameters(parameters)), tokens_BxT)
    steps = batch_benchmark._their_steps(theirs, tokens_BxT)
    steps()
    np.testing.assert_array_equal(np.asarray(ours())[:, -1:], steps())
