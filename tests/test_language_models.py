"""GPT-2, Llama and Mistral against transformers: logits, block inputs, decoding with a cache, meshes, folders.

Random weights, tiny sizes. The oracle of a padded batch with a cache is a forward pass of each sequence by itself.
"""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.inference import decoding
from mlpmem_jax.inference.decoding import DecoderConfig, Parameters, prepare
from mlpmem_jax.interop import huggingface
from mlpmem_jax.models import language_model

LLAMA = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 96,
    "rms_norm_eps": 1e-5,
}
CASES = {
    "gpt2": {"vocab_size": 61, "n_positions": 96, "n_embd": 16, "n_layer": 3, "n_head": 2},
    "llama2": LLAMA,
    "llama3": {
        **LLAMA,
        "num_key_value_heads": 2,
        "head_dim": 12,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "linear": {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}},
    "dynamic": {
        **LLAMA,
        "max_position_embeddings": 20,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 3.0},
    },
    "yarn": {
        **LLAMA,
        "head_dim": 16,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 100.0,
            "factor": 4.0,
            "original_max_position_embeddings": 24,
            "beta_fast": 3.0,
        },
    },
    "mistral": {**LLAMA, "num_key_value_heads": 2, "sliding_window": 7, "tie_word_embeddings": False},
}
CLASSES = {"gpt2": "GPT2", "mistral": "Mistral"}
LENGTH = 24


@functools.cache
def reference(name):
    """The model of transformers, with no unit scales or zero biases, which would hide mistakes."""
    family = CLASSES.get(name, "Llama")
    config = getattr(transformers, f"{family}Config")(**CASES[name], bos_token_id=None, eos_token_id=None)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder of each model as transformers saves it, made when asked for."""

    @functools.cache
    def folder(name):
        path = tmp_path_factory.mktemp(name)
        reference(name).save_pretrained(path, max_shard_size="20KB" if name == "mistral" else "5GB")
        return path

    return folder


@functools.cache
def load(folder: pathlib.Path):
    return huggingface.load_language_model(str(folder), Sharding(make_mesh(1, 1, 1, jax.devices()[:1])))


def tokens(name, sequences=2, length=LENGTH):
    return np.random.default_rng(0).integers(0, CASES[name]["vocab_size"], (sequences, length))


def expected_logits(name, tokens_BxT):
    with torch.no_grad():
        return reference(name)(torch.from_numpy(tokens_BxT)).logits.numpy()


@pytest.mark.parametrize("name", CASES)
def test_logits_and_block_inputs_equal_those_of_transformers(folders, name):
    parameters, config = load(folders(name))
    tokens_BxT, inputs, model = tokens(name), [], reference(name)
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    hooks = [block.mlp.register_forward_pre_hook(lambda _, given: inputs.append(given[0].numpy())) for block in blocks]
    expected = expected_logits(name, tokens_BxT)
    for hook in hooks:
        hook.remove()
    np.testing.assert_allclose(language_model.logits(parameters, config, tokens_BxT), expected, rtol=0, atol=1e-4)
    final, block_inputs = language_model.features(parameters, config, tokens_BxT, input_blocks=(3, 1))
    for number in (1, 3):
        np.testing.assert_allclose(block_inputs[number], inputs[number - 1], rtol=0, atol=1e-4)
    np.testing.assert_allclose(language_model.vocabulary_logits(parameters, config, final), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "dtype", "apart"),
    [
        ("gpt2", "float32", 1e-4),
        ("llama3", "float32", 1e-4),
        ("mistral", "float32", 1e-4),
        ("llama3", "bfloat16", 0.25),
    ],
)
def test_padded_prompts_and_64_cached_steps_equal_single_forward_passes(folders, name, dtype, apart):
    parameters, config = load(folders(name))
    steps, padding_B = 64, np.array([5, 0, 11])
    tokens_BxT = tokens(name, 3, 16 + steps)
    models, prepared = DecoderConfig(config), prepare(Parameters(parameters), dtype)
    prefill = jax.jit(decoding.prefill, static_argnums=(0, 4))
    reading, cache = prefill(models, prepared, tokens_BxT[:, :16], padding_B, 16 + steps)
    step, actual = jax.jit(decoding.step, static_argnums=0), [reading.base_log_BxV]
    for position in range(16, 16 + steps):
        reading, cache = step(models, prepared, cache, tokens_BxT[:, position])
        actual.append(reading.base_log_BxV)
    found_BxTxV = np.stack(actual, axis=1)
    for row, padding in enumerate(padding_B):
        expected = jax.nn.log_softmax(expected_logits(name, tokens_BxT[row : row + 1, padding:]))[0, 15 - padding :]
        np.testing.assert_allclose(found_BxTxV[row], expected, rtol=0, atol=apart)


@pytest.mark.parametrize("name", ["llama3", "mistral"])
def test_a_mesh_changes_no_logit(folders, name):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = make_mesh(1, 4, 2, jax.devices()[:8])
    parameters, config = huggingface.load_language_model(str(folders(name)), Sharding(mesh))
    kernel = parameters["h"]["self_attn"]["k_proj"]["kernel"]
    assert kernel.addressable_shards[0].data.size == kernel.size // 8
    tokens_BxT = tokens(name, sequences=8)
    batch = Sharding(mesh).named("batch", None, None)
    final, _ = jax.jit(functools.partial(language_model.features, config=config, activations=batch))(
        parameters, tokens_BxT=jax.device_put(tokens_BxT, Sharding(mesh).named("batch", None))
    )
    logits = jnp.dot(final, language_model.output_kernel(parameters))
    np.testing.assert_allclose(logits, expected_logits(name, tokens_BxT), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CASES)
def test_a_written_folder_holds_the_same_tensors_and_config(folders, name, tmp_path):
    parameters, config = load(folders(name))
    huggingface.save_language_model(tmp_path, parameters, config, maximum_shard_bytes=20_000)
    written, original = (read_all(folder) for folder in (tmp_path, folders(name)))
    assert written.keys() == original.keys()
    for key, tensor in written.items():
        np.testing.assert_array_equal(tensor, original[key])
    assert max(file.stat().st_size for file in tmp_path.glob("*.safetensors")) < 26_000
    again, same = load(tmp_path)
    assert same == config
    jax.tree.map(np.testing.assert_array_equal, again, parameters)


def read_all(folder):
    return {
        name: tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in safetensors.numpy.load_file(file).items()
    }


@pytest.mark.parametrize("name", ["gpt2", "llama3", "yarn", "mistral"])
def test_transformers_loads_a_written_folder(folders, name, tmp_path):
    huggingface.save_language_model(tmp_path, *load(folders(name)))
    assert not (tmp_path / "model.safetensors.index.json").exists()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    assert type(model) is type(reference(name))
    tokens_BxT = tokens(name)
    with torch.no_grad():
        actual = model(torch.from_numpy(tokens_BxT)).logits.numpy()
    np.testing.assert_array_equal(actual, expected_logits(name, tokens_BxT))
    with pytest.raises(UserError, match="already has weights"):
        huggingface.save_language_model(tmp_path, *load(folders(name)))


@pytest.mark.parametrize("name", CASES)
def test_configs_pass_through_manifests(folders, name):
    _, config = load(folders(name))
    fields = json.loads(json.dumps(dataclasses.asdict(config)))
    assert language_model.from_fields(fields) == config
    assert ("family" in fields) == (name != "gpt2")
    with pytest.raises(ValueError, match="bloom"):
        language_model.from_fields({**fields, "family": "bloom"})


def test_what_no_family_knows_is_an_error_and_never_taken_for_another():
    with pytest.raises(ValueError, match="'gpt5' are not known; expected one of gpt2, llama, mistral"):
        language_model.from_fields({"family": "gpt5"})
    with pytest.raises(TypeError, match="object is not the config of any of the families gpt2, llama, mistral"):
        language_model.logical_axes(object())
    with pytest.raises(ValueError, match="not those of any of the families gpt2"):
        language_model.output_kernel({"embedding": 1})
