"""Weights of Hugging Face folders: parity with transformers, the errors that bad ones give, the memory of reading."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from launch import local
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import huggingface
from mlpmem_jax.models import language_model

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
    return huggingface.load_language_model(source, Sharding(make_mesh(1, 1, 1, jax.devices()[:1])))


@pytest.mark.parametrize("max_shard_size", ["5GB", "20KB"])
def test_logits_equal_those_of_transformers(tmp_path, max_shard_size):
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
    np.testing.assert_allclose(language_model.logits(parameters, config, tokens_BxT), expected, rtol=0, atol=1e-4)


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
    divided, _ = huggingface.load_language_model(source, Sharding(make_mesh(1, 2, 2, jax.devices()[:4])))
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
        (lambda weights: weights["h.2.mlp.c_fc.bias"].__setitem__(5, np.nan), "'h.2.mlp.c_fc.bias' has values that"),
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
        ({"n_inner": "64"}, "n_inner is '64'; expected a whole number above 0, or null"),
        ({"layer_norm_epsilon": "1e-5"}, "layer_norm_epsilon is '1e-5'; expected a number above 0, or null"),
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


LLAMA = {
    "model_type": "llama",
    "vocab_size": 61,
    "max_position_embeddings": 24,
    "hidden_size": 16,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama_tensors(seed=0):
    """Random weights of LLAMA under the names and shapes of the PyTorch module."""
    random = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (61, 16), "lm_head.weight": (61, 16), "model.norm.weight": (16,)}
    for block in range(2):
        for name, shape in {
            "input_layernorm": (16,),
            "post_attention_layernorm": (16,),
            "self_attn.q_proj": (16, 16),
            "self_attn.k_proj": (8, 16),
            "self_attn.v_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "mlp.gate_proj": (20, 16),
            "mlp.up_proj": (20, 16),
            "mlp.down_proj": (16, 20),
        }.items():
            shapes[f"model.layers.{block}.{name}.weight"] = shape
    return {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


def write_llama(folder, weights, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**LLAMA, **changes}))
    safetensors.numpy.save_file(weights, folder / "model.safetensors")
    return str(folder)


def test_half_precision_old_buffers_and_bare_names_of_a_llama(tmp_path):
    plain, config = load(write_llama(tmp_path / "plain", llama_tensors()))
    assert (config.head_width, config.key_value_heads, config.sliding_window, config.tied) == (4, 2, 0, False)
    weights = {name.removeprefix("model."): tensor for name, tensor in llama_tensors().items()}
    for buffer in ("layers.0.self_attn.rotary_emb.inv_freq", "layers.1.self_attn.rotary_emb.cos_cached"):
        weights[buffer] = weights["rotary_emb.sin_cached"] = np.ones(2, np.float32)
    bare, _ = load(write_llama(tmp_path / "bare", weights))
    jax.tree.map(np.testing.assert_array_equal, plain, bare)
    halved = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in llama_tensors().items()}
    half, _ = load(write_llama(tmp_path / "half", halved))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.astype(ml_dtypes.bfloat16), b), plain, half)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda weights: weights.pop("model.layers.1.self_attn.k_proj.weight"), r"layers\.1\.self_attn\.k_proj"),
        (lambda weights: weights.pop("lm_head.weight"), "'lm_head.weight' .* is missing"),
        (lambda weights: weights.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16)}), "q_proj.bias"),
        (lambda weights: weights.update({"model.layers.1.mlp.up_proj.weight": np.ones((16, 20))}), "up_proj"),
        (lambda weights: weights.update({"model.norm.weight": np.ones(16, np.int8)}), "model.norm.weight.*I8"),
    ],
)
def test_a_wrong_tensor_of_a_llama_is_named(tmp_path, change, named):
    weights = llama_tensors()
    change(weights)
    with pytest.raises(UserError, match=named):
        load(write_llama(tmp_path / "model", weights))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, r"rope_scaling\.rope_type is 'longrope'.*'llama3'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4}}, r"rope_parameters\.factor is None"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, r"rope_scaling\.low_freq_factor is None"),
        ({"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "8"}}, "original_max"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}},
            r"rope_parameters has groups for kinds of layers \(full_attention, sliding_attention\)",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "weights are quantized .* quant_method 'gptq'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads, 3, does not divide"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"head_dim": "4"}, "head_dim is '4'; expected a whole number above 0, or null"),
        ({"num_key_value_heads": 2.0}, r"num_key_value_heads is 2\.0; expected a whole number above 0, or null"),
        ({"model_type": "mistral", "sliding_window": "5"}, "sliding_window is '5'; expected a whole number"),
        ({"rms_norm_eps": True}, "rms_norm_eps is True; expected a number above 0, or null"),
        ({"rope_theta": float("nan")}, "rope_theta is nan; expected a number above 0, or null"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected a group, or null"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor is '2'; expected a number above 0, or null"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; expected true or false, or null"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"tie_word_embeddings": True}, "'lm_head.weight' differs from 'embed_tokens.weight'"),
        ({"num_hidden_layers": 3}, r"layers\.2\..* is missing"),
    ],
)
def test_an_unsuitable_config_of_a_llama_is_refused(tmp_path, changes, named):
    with pytest.raises(UserError, match=named):
        load(write_llama(tmp_path / "model", llama_tensors(), **changes))


def test_a_truncated_or_missing_shard_is_named(tmp_path):
    source, weights = write_llama(tmp_path / "model", llama_tensors()), llama_tensors()
    (tmp_path / "model" / "model.safetensors").unlink()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    for shard, held in shards.items():
        safetensors.numpy.save_file({name: weights[name] for name in held}, tmp_path / "model" / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    load(source)
    last = tmp_path / "model" / "model-2.safetensors"
    last.write_bytes(last.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model-2\.safetensors"):
        load(source)
    last.unlink()
    with pytest.raises(UserError, match=r"model-2\.safetensors"):
        load(source)


def test_what_the_mesh_does_not_divide_is_held_whole_by_every_device(tmp_path):
    """Two heads of keys over four devices; the width of 16 over four, and 20 inner numbers over four, are divided."""
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    source = write_llama(tmp_path / "model", llama_tensors())
    whole, config = load(source)
    tokens_BxT = np.random.default_rng(0).integers(0, 61, (2, 12))
    expected = language_model.logits(whole, config, tokens_BxT)
    for sizes, divided, replicated in (((1, 1, 4), "q_proj", "k_proj"), ((1, 4, 1), "k_proj", None)):
        parameters, _ = huggingface.load_language_model(source, Sharding(make_mesh(*sizes, jax.devices()[:4])))
        attention = parameters["h"]["self_attn"]
        assert not attention[divided]["kernel"].is_fully_replicated
        assert replicated is None or attention[replicated]["kernel"].is_fully_replicated
        jax.tree.map(np.testing.assert_array_equal, whole, parameters)
        actual = jax.jit(language_model.logits, static_argnums=1)(parameters, config, tokens_BxT)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)


# One of two processes: reads a folder, prints how many numbers of it, and writes the model as another folder.
_LOAD_AND_SAVE = """
import json, os, sys
from mlpmem_jax.core import distributed, host, mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import huggingface, tensor_files
source, output = sys.argv[1:]
read, numbers = huggingface._read, 0
def counted(*arguments):
    global numbers
    part = read(*arguments)
    numbers += part.size
    return part
huggingface._read = counted
with distributed.job(os.path.dirname(output)):
    parameters, config = huggingface.load_language_model(source, Sharding(mesh.make_mesh()))
    huggingface.save_language_model(output, parameters, config, maximum_shard_bytes=8000)
print(numbers)
"""


def test_two_processes_read_half_of_a_sharded_checkpoint_each_and_write_it_whole(tmp_path):
    weights = llama_tensors()
    names = sorted(weights)
    shards = {"model-1.safetensors": names[:9], "model-2.safetensors": names[9:]}
    write_llama(tmp_path / "source", weights)
    (tmp_path / "source" / "model.safetensors").unlink()
    for shard, held in shards.items():
        safetensors.numpy.save_file({name: weights[name] for name in held}, tmp_path / "source" / shard)
    index = {"weight_map": {name: shard for shard, held in shards.items() for name in held}}
    (tmp_path / "source" / "model.safetensors.index.json").write_text(json.dumps(index))

    command = [sys.executable, "-c", _LOAD_AND_SAVE, str(tmp_path / "source"), str(tmp_path / "output")]
    processes = [
        subprocess.Popen(
            command, env={**os.environ, **variables}, stdout=subprocess.PIPE, text=True,
            cwd=pathlib.Path(__file__).parent.parent,
        )
        for variables in local.environments(2, 1, local.free_port())
    ]  # fmt: skip
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    norms = sum(tensor.size for tensor in weights.values() if tensor.ndim == 1)
    total = sum(tensor.size for tensor in weights.values())
    for text in printed:
        assert int(text) <= total / 2 + norms

    written = {}
    for file in (tmp_path / "output").glob("*.safetensors"):
        written |= safetensors.numpy.load_file(file)
    assert len(list((tmp_path / "output").glob("*.safetensors"))) > 1
    assert written.keys() == weights.keys()
    for name, tensor in weights.items():
        np.testing.assert_array_equal(written[name], tensor)


_LOAD_AND_TELL_MEMORY = """
import sys, jax, jax.numpy as jnp
from mlpmem_jax.core import distributed, host, mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import huggingface
jax.block_until_ready(jax.jit(lambda x: x + 1)(jnp.ones(3)))
before = host.peak_rss_bytes()
parameters, _ = huggingface.load_language_model(sys.argv[1], Sharding(mesh.make_mesh()))
size = sum(array.nbytes for array in jax.tree.leaves(parameters))
print(before, host.peak_rss_bytes(), size, float(parameters["h"]["mlp"]["up_proj"]["kernel"][5].mean()))
"""


def test_importing_a_sharded_checkpoint_holds_little_more_than_its_parameters(tmp_path):
    """On CPU the parameters (twice the size of the bfloat16 checkpoint) lie in the host's memory too."""
    width, inner, blocks = 1024, 4096, 6
    changes = {"vocab_size": 4096, "hidden_size": width, "intermediate_size": inner, "num_hidden_layers": blocks}
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, **changes, "num_key_value_heads": 4}))

    def constant(value, *shape):
        return np.full(shape, value, ml_dtypes.bfloat16)

    shards = [{name: constant(1, 4096, width) for name in ("model.embed_tokens.weight", "lm_head.weight")}]
    shards[0]["model.norm.weight"] = constant(1, width)
    for block in range(blocks):
        matrices = {f"self_attn.{part}_proj": (width, width) for part in "qkvo"}
        matrices |= {"mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width), "mlp.down_proj": (width, inner)}
        matrices |= {"input_layernorm": (width,), "post_attention_layernorm": (width,)}
        shards.append({f"model.layers.{block}.{name}.weight": constant(block, *s) for name, s in matrices.items()})
    weight_map = {}
    for number, shard in enumerate(shards):
        weight_map |= dict.fromkeys(shard, f"model-{number}.safetensors")
        safetensors.numpy.save_file(shard, tmp_path / f"model-{number}.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    sizes = [file.stat().st_size for file in tmp_path.glob("*.safetensors")]
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_AND_TELL_MEMORY, str(tmp_path)],
        env={**os.environ, "XLA_FLAGS": ""}, cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    shutil.rmtree(tmp_path)
    before, peak, parameters, mean = map(float, done.stdout.split())
    assert mean == 5
    assert parameters == pytest.approx(2 * sum(sizes), rel=1e-3)
    assert peak < max(sizes) + 2**30
    assert peak - before - parameters < max(sizes) + 2**27 < sum(sizes)
