"""Low-rank adaptation: merged weights are the adapted model, of GPT-2 and of Llama."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import peft
import pytest
import torch
import transformers

from mlpmem_jax.interop import huggingface, peft_adapter
from mlpmem_jax.models import language_model
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.training import lora

MODELS = {
    "gpt2": GPT2Config(vocab_size=40, context_length=16, width=12, blocks=2, heads=3),
    "llama": LlamaConfig(40, 16, 12, 2, 4, 2, 6, 20),
}
ADAPTED = {
    "gpt2": {"attn.c_attn.kernel", "mlp.c_fc.kernel", "mlp.c_proj.kernel"},
    "llama": {f"self_attn.{name}_proj.kernel" for name in "qkv"}
    | {f"mlp.{name}_proj.kernel" for name in ("gate", "up", "down")},
}


def made(name, rank=3):
    model = MODELS[name]
    parameters = language_model.init(model, jax.random.key(0))
    axes = language_model.logical_axes(model)
    adapters = lora.init(jax.eval_shape(lambda: parameters), axes, rank, jax.random.key(1))
    return model, parameters, axes, adapters


@pytest.mark.parametrize("name", MODELS)
def test_all_matrices_but_the_attentions_output_are_adapted(name):
    _, parameters, axes, adapters = made(name)
    assert set(adapters) == ADAPTED[name]
    assert jax.tree.structure(adapters) == jax.tree.structure(
        lora.adapter_axes(axes), is_leaf=lambda leaf: isinstance(leaf, tuple)
    )
    count = sum(array.size for array in jax.tree.leaves(adapters))
    assert count == 3 * lora.parameters_per_rank(jax.eval_shape(lambda: parameters), axes)


@pytest.mark.parametrize("name", MODELS)
def test_it_starts_as_the_model_itself(name):
    _, parameters, _, adapters = made(name)
    jax.tree.map(np.testing.assert_array_equal, lora.merge(parameters, adapters), parameters)


@pytest.mark.parametrize("name", MODELS)
def test_merged_weights_are_w_plus_a_b(name):
    _, parameters, _, adapters = made(name)
    adapters = jax.tree.map(lambda array: jax.random.normal(jax.random.key(array.size), array.shape), adapters)
    merged = lora.merge(parameters, adapters)
    random = np.random.default_rng(0)
    for path, adapter in adapters.items():
        kernel, new = (
            functools.reduce(lambda tree, key: tree[key], path.split("."), of["h"]) for of in (parameters, merged)
        )
        for block in range(2):
            x = random.normal(size=(5, kernel.shape[1]))
            own = np.tensordot(x, kernel[block], 1)
            low = np.tensordot(x @ np.asarray(adapter["a"][block]), adapter["b"][block], 1)
            np.testing.assert_allclose(np.tensordot(x, new[block], 1), own + lora.SCALE * low, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_training_changes_the_adapters_alone(name):
    model, parameters, _, adapters = made(name)
    tokens = jnp.arange(16)[None] % 40

    def loss(adapters):
        return language_model.logits(lora.merge(parameters, adapters), model, tokens)[0, :, 3].sum()

    gradients = jax.grad(loss)(adapters)
    for adapter in gradients.values():
        assert float(jnp.abs(adapter["b"]).max()) > 0
        assert float(jnp.abs(adapter["a"]).max()) == 0  # as long as B is zero


@pytest.mark.parametrize("name", MODELS)
def test_peft_gives_the_logits_of_the_merged_model(name, tmp_path):
    model, parameters, _, adapters = made(name)
    adapters = jax.tree.map(lambda array: 0.3 * jax.random.normal(jax.random.key(array.size), array.shape), adapters)
    huggingface.save_language_model(tmp_path / "base", parameters, model)
    (tmp_path / "adapters").mkdir()
    peft_adapter.write(tmp_path / "adapters", adapters, model, str(tmp_path / "base"))
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters").eval()
    tokens = np.arange(12)[None] * 3 % 40
    with torch.no_grad():
        expected = adapted(torch.tensor(tokens)).logits.numpy()
    merged = lora.merge(parameters, adapters)
    np.testing.assert_allclose(language_model.logits(merged, model, tokens), expected, rtol=1e-4, atol=1e-5)
    assert float(np.abs(expected - language_model.logits(parameters, model, tokens)).max()) > 0.01
