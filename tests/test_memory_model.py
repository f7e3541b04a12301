"""The memory against a float64 NumPy version of its equations, for both families."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import memory, parallel_memory

GPT2 = memory.MemoryConfig("gpt2", 50, 56, 16, 16, 3, 64, norm_epsilon=1e-5, activation="gelu_new")
LLAMA = memory.MemoryConfig("llama", 50, 56, 16, 16, 3, 40, norm_epsilon=1e-6, activation="silu")
CASES = [
    GPT2,
    LLAMA,
    dataclasses.replace(GPT2, input_width=24),
    dataclasses.replace(LLAMA, input_width=24),
    dataclasses.replace(GPT2, activation="gelu"),
]
ACTIVATIONS = {
    "gelu_new": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu": lambda x: x * scipy.special.ndtr(x),
    "silu": lambda x: x * scipy.special.expit(x),
}


def random_parameters(config, seed=0):
    shapes = jax.eval_shape(functools.partial(memory.init, config), jax.random.key(0))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda array: random.normal(0.1, 0.4, array.shape).astype(np.float32), shapes)


def norm(config, x, parameters):
    if config.family == "llama":
        return x / np.sqrt((x**2).mean() + config.norm_epsilon) * parameters["scale"]
    centred = x - x.mean()
    return centred / np.sqrt((centred**2).mean() + config.norm_epsilon) * parameters["scale"] + parameters["bias"]


def oracle(config, parameters, x):
    """(final hidden state, logits) of one input vector."""
    parameters = jax.tree.map(lambda array: np.asarray(array, np.float64), parameters)
    activation = ACTIVATIONS[config.activation]
    if config.input_width != config.width:
        transform = parameters["embedding_transform"]
        x = x @ transform["kernel"] + transform["bias"]
    for block in range(config.blocks):
        layer = jax.tree.map(lambda array, block=block: array[block], parameters["h"])
        normed, mlp = norm(config, x, layer["norm"]), layer["mlp"]
        if config.family == "gpt2":
            middle = activation(normed @ mlp["c_fc"]["kernel"] + mlp["c_fc"]["bias"])
            x = x + middle @ mlp["c_proj"]["kernel"] + mlp["c_proj"]["bias"]
        else:
            middle = activation(normed @ mlp["gate_proj"]["kernel"]) * (normed @ mlp["up_proj"]["kernel"])
            x = x + middle @ mlp["down_proj"]["kernel"]
    final = norm(config, x, parameters["final_norm"])
    return final, final @ parameters["lm_head"]["kernel"]


@pytest.mark.parametrize("config", CASES, ids=lambda case: f"{case.family}-{case.input_width}-{case.activation}")
def test_hidden_states_and_logits_equal_the_equations(config):
    parameters = random_parameters(config)
    inputs = np.random.default_rng(1).normal(size=(2, 3, config.input_width)).astype(np.float32)
    final = memory.hidden(parameters, config, inputs)
    logits = np.asarray(memory.logits(parameters, config, inputs))
    assert final.dtype == logits.dtype == np.float32
    assert final.shape == (2, 3, config.width)
    for index in np.ndindex(2, 3):
        expected_final, expected_logits = oracle(config, parameters, inputs[index].astype(np.float64))
        np.testing.assert_allclose(final[index], expected_final, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits[index][:50], expected_logits[:50], rtol=1e-4, atol=1e-4)
    assert np.all(logits[..., 50:] == -np.inf)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=lambda config: config.family)
def test_remat_changes_no_gradient(config):
    parameters = random_parameters(config)
    inputs = np.random.default_rng(1).normal(size=(5, config.input_width)).astype(np.float32)

    def loss(parameters, remat):
        return jnp.sum(memory.hidden(parameters, config, inputs, remat=remat)[..., 0] ** 2)

    kept, again = (jax.jit(jax.grad(loss), static_argnums=1)(parameters, remat) for remat in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), kept, again)


def test_bfloat16_stays_near_float32():
    parameters = memory.init(GPT2, jax.random.key(0))
    inputs = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    exact = memory.hidden(parameters, GPT2, inputs)
    rounded = memory.hidden(parameters, GPT2, inputs, compute_dtype=jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    assert 0 < np.abs(exact - rounded).max() < 0.05


def test_the_output_projection_can_start_from_the_base():
    kernel_DxV = np.random.default_rng(2).normal(size=(16, 50)).astype(np.float32)
    parameters = memory.init(GPT2, jax.random.key(0), kernel_DxV)
    np.testing.assert_array_equal(memory.output_kernel(parameters)[:, :50], kernel_DxV)
    np.testing.assert_array_equal(memory.output_kernel(parameters)[:, 50:], 0)
    with pytest.raises(ValueError, match="output projection"):
        memory.init(GPT2, jax.random.key(0), kernel_DxV[:, :49])


@pytest.mark.parametrize("config", [LLAMA, dataclasses.replace(GPT2, input_width=24)], ids=["llama", "projected"])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_every_array_has_logical_axes_and_a_mesh_changes_no_hidden_state(config, sizes):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = make_mesh(*sizes, devices=jax.devices()[:8])
    parameters = random_parameters(config)
    inputs = np.random.default_rng(1).normal(size=(16, config.input_width)).astype(np.float32)
    divided = jax.device_put(parameters, Sharding(mesh).tree(memory.logical_axes(config)))
    hidden = jax.jit(functools.partial(parallel_memory.hidden, config=config), static_argnames="sharding")
    final = hidden(divided, inputs_BxD=inputs, sharding=Sharding(mesh))
    np.testing.assert_allclose(final, memory.hidden(parameters, config, inputs), rtol=1e-4, atol=1e-4)
    stream = jax.sharding.PartitionSpec(("slice", "fsdp", "tensor"))
    assert final.sharding.is_equivalent_to(jax.sharding.NamedSharding(mesh, stream), 2)

    def loss(parameters, sharding):
        return jnp.sum(parallel_memory.hidden(parameters, config, inputs, sharding=sharding) ** 3)

    expected = jax.grad(lambda parameters: jnp.sum(memory.hidden(parameters, config, inputs) ** 3))(parameters)
    actual = jax.jit(jax.grad(loss), static_argnames="sharding")(divided, sharding=Sharding(mesh))
    jax.tree.map(lambda one, two: np.testing.assert_allclose(one, two, rtol=1e-4, atol=1e-4), actual, expected)


def test_positions_that_tensor_shards_do_not_divide_stay_whole_in_each():
    sharding = Sharding(make_mesh(1, 2, 4, devices=jax.devices()[:8]))
    parameters = random_parameters(GPT2)
    inputs = np.random.default_rng(1).normal(size=(6, GPT2.input_width)).astype(np.float32)
    final = parallel_memory.hidden(parameters, GPT2, inputs, sharding=sharding)
    np.testing.assert_allclose(final, memory.hidden(parameters, GPT2, inputs), rtol=1e-4, atol=1e-4)
    with pytest.raises(ConfigError, match="5 positions cannot be divided into 2"):
        parallel_memory.hidden(parameters, GPT2, inputs[:5], sharding=sharding)


@pytest.mark.parametrize(("key", "value"), [("family", "bert"), ("activation", "tanh"), ("padded_vocab_size", 49)])
def test_unknown_families_activations_and_too_little_padding_are_refused(key, value):
    with pytest.raises(ValueError, match=key):
        dataclasses.replace(GPT2, **{key: value})
