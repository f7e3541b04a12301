import pytest

from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.retrieval import forward_benchmark

SMALL = {
    "gpt2": GPT2Config(vocab_size=64, context_length=32, width=16, blocks=2, heads=2),
    "llama": LlamaConfig(
        vocab_size=64,
        context_length=32,
        width=16,
        blocks=2,
        heads=4,
        key_value_heads=2,
        head_width=4,
        feed_forward_width=32,
    ),
}


@pytest.mark.slow
def test_rows_of_both_libraries(monkeypatch):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    monkeypatch.setattr(forward_benchmark, "MODELS", SMALL)
    monkeypatch.setattr(forward_benchmark, "POSITIONS", 64)
    monkeypatch.setattr(forward_benchmark, "LENGTHS", (16, 32))
    monkeypatch.setattr(forward_benchmark, "ROUNDS", 2)
    rows = {row["name"]: row for row in forward_benchmark.rows(None)}
    assert all(row["value"] > 0 for row in rows.values())
    assert len(rows) == 3 + 2 * 2 * 2
    assert "times PyTorch's rate" in rows["forward, llama, 4 x 16, JAX"]["detail"]


@pytest.mark.parametrize("family", SMALL)
def test_the_models_that_are_compared_have_the_same_parameters(family):
    transformers = pytest.importorskip("transformers")
    import jax

    from mlpmem_jax.models import language_model

    ours = language_model.init(SMALL[family], jax.random.key(0))
    theirs = forward_benchmark.causal_model(transformers, SMALL[family])
    counted = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(leaf.size for leaf in jax.tree.leaves(ours)) == counted
