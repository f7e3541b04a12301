"""Weights of Hugging Face GPT-2 models: parity with transformers, and the errors that bad folders give."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.interop import huggingface
from mlpmem_jax.models import gpt2

CONFIG = {"model_type": "gpt2", "vocab_size": 61, "n_positions": 24, "n_embd": 16, "n_layer": 3, "n_head": 2}


def tensors(seed=0):
    """Random weights of CONFIG under the names and shapes of the PyTorch module."""
    random = np.random.default_rng(seed)
    width = CONFIG["n_embd"]
    shapes = {"wte.weight": (CONFIG["vocab_size"], width), "wpe.weight": (CONFIG["n_positions"], width)}
    for block in range(CONFIG["n_layer"]):
        for name, shape in {
            "ln_1.weight": (width,),
            "ln_1.bias": (width,),
            "attn.c_attn.weight": (width, 3 * width),
            "attn.c_attn.bias": (3 * width,),
            "attn.c_proj.weight": (width, width),
            "attn.c_proj.bias": (width,),
            "ln_2.weight": (width,),
            "ln_2.bias": (width,),
            "mlp.c_fc.weight": (width, 4 * width),
            "mlp.c_fc.bias": (4 * width,),
            "mlp.c_proj.weight": (4 * width, width),
            "mlp.c_proj.bias": (width,),
        }.items():
            shapes[f"h.{block}.{name}"] = shape
    shapes |= {"ln_f.weight": (width,), "ln_f.bias": (width,)}
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder, weights, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return str(folder)


def load(source):
    return huggingface.load_language_model(source, make_mesh(1, 1, 1, jax.devices()[:1]))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_logits_equal_those_of_transformers(tmp_path, max_shard_size):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=61, n_positions=24, n_embd=16, n_layer=3, n_head=2)
    ).eval()
    with torch.no_grad():  # a fresh model's zero biases and unit scales would hide mistakes
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (max_shard_size == "20KB")

    parameters, config = load(str(tmp_path))
    tokens_BxT = np.random.default_rng(0).integers(0, 61, (2, 24))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens_BxT)).logits.numpy()
    np.testing.assert_allclose(gpt2.logits(parameters, config, tokens_BxT), expected, rtol=0, atol=1e-4)


def test_prefix_and_old_masks_change_nothing(tmp_path):
    plain, _ = load(write(tmp_path / "plain", tensors()))
    prefixed = {f"transformer.{name}": tensor for name, tensor in tensors().items()}
    prefixed["transformer.h.0.attn.bias"] = np.tril(np.ones((1, 1, 24, 24), np.float32))
    prefixed["lm_head.weight"] = tensors()["wte.weight"]
    other, _ = load(write(tmp_path / "prefixed", prefixed))
    jax.tree.map(np.testing.assert_array_equal, plain, other)


def test_sharded_parameters_are_the_same(tmp_path):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    source = write(tmp_path / "model", tensors())
    whole, _ = load(source)
    divided, _ = huggingface.load_language_model(source, make_mesh(1, 2, 2, jax.devices()[:4]))
    kernel = divided["h"]["mlp"]["c_fc"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 4
    jax.tree.map(np.testing.assert_array_equal, whole, divided)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("h.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
        (lambda weights: weights.update({"h.3.ln_1.bias": np.zeros(16, np.float32)}), "h.3.ln_1.bias"),
        (lambda weights: weights.update({"ln_f.bias": np.zeros(17, np.float32)}), "ln_f.bias"),
        (lambda weights: weights.update({"wte.weight": np.zeros((60, 16), np.float32)}), "wte.weight"),
        (lambda weights: weights.update({"lm_head.weight": np.ones((61, 16), np.float32)}), "lm_head.weight"),
    ],
)
def test_a_wrong_tensor_is_named(tmp_path, change, named):
    weights = tensors()
    change(weights)
    with pytest.raises(UserError, match=named):
        load(write(tmp_path / "model", weights))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "bloom"}, "model_type"),
        ({"activation_function": "relu"}, "activation_function"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"n_inner": 48}, "n_inner"),
        ({"n_head": 3}, "n_head"),
        ({"n_embd": None}, "n_embd"),
        ({"vocab_size": 62}, "wte.weight"),
    ],
)
def test_an_unsuitable_config_is_refused(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        load(write(tmp_path / "model", tensors(), **changes))


def test_a_folder_without_weights_and_a_truncated_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load(str(tmp_path / "nothing"))
    source = write(tmp_path / "model", tensors())
    file = tmp_path / "model" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(source)
    file.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors"):
        load(source)
