"""GPT-2 against a float64 NumPy version of its equations, written per position and per head."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import gpt2, language_model

CONFIG = gpt2.GPT2Config(vocab_size=50, context_length=12, width=16, blocks=3, heads=4)


def random_parameters(seed=0):
    """Parameters with no zero biases and no unit scales, float32."""
    shapes = jax.eval_shape(functools.partial(gpt2.init, CONFIG), jax.random.key(0))
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda array: random.normal(0.1, 0.4, array.shape).astype(np.float32), shapes)


def norm(x, parameters):
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).mean(-1, keepdims=True)
    return centred / np.sqrt(variance + CONFIG.norm_epsilon) * parameters["scale"] + parameters["bias"]


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def oracle(parameters, tokens_T):
    """(hidden after ln_f, inputs of all blocks, logits) of one sequence."""
    parameters = jax.tree.map(lambda array: np.asarray(array, np.float64), parameters)
    x = parameters["wte"]["embedding"][tokens_T] + parameters["wpe"]["embedding"][: len(tokens_T)]
    block_inputs = {}
    for block in range(CONFIG.blocks):
        layer = jax.tree.map(lambda array, block=block: array[block], parameters["h"])
        attention = layer["attn"]
        projected = np.einsum("td,dche->tche", norm(x, layer["ln_1"]), attention["c_attn"]["kernel"])
        query, key, value = np.moveaxis(projected + attention["c_attn"]["bias"], 1, 0)
        mixed = np.zeros_like(query)
        for t in range(len(tokens_T)):
            for head in range(CONFIG.heads):
                scores = key[: t + 1, head] @ query[t, head] / np.sqrt(CONFIG.head_width)
                weights = np.exp(scores - scores.max())
                mixed[t, head] = weights @ value[: t + 1, head] / weights.sum()
        x = x + np.einsum("the,hed->td", mixed, attention["c_proj"]["kernel"]) + attention["c_proj"]["bias"]
        block_inputs[block + 1] = norm(x, layer["ln_2"])
        middle = gelu_new(block_inputs[block + 1] @ layer["mlp"]["c_fc"]["kernel"] + layer["mlp"]["c_fc"]["bias"])
        x = x + middle @ layer["mlp"]["c_proj"]["kernel"] + layer["mlp"]["c_proj"]["bias"]
    final = norm(x, parameters["ln_f"])
    return final, block_inputs, final @ parameters["wte"]["embedding"].T


def tokens(sequences=2, length=9, seed=1):
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, (sequences, length))


def test_hidden_states_block_inputs_and_logits_equal_the_equations():
    parameters, tokens_BxT = random_parameters(), tokens()
    final, block_inputs = language_model.features(parameters, CONFIG, tokens_BxT, input_blocks=(3, 1))
    logits = language_model.logits(parameters, CONFIG, tokens_BxT)
    assert list(block_inputs) == [3, 1]
    for row, sequence in enumerate(tokens_BxT):
        expected_final, expected_inputs, expected_logits = oracle(parameters, sequence)
        np.testing.assert_allclose(final[row], expected_final, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(logits[row], expected_logits, rtol=1e-4, atol=1e-4)
        for number in (1, 3):
            np.testing.assert_allclose(block_inputs[number][row], expected_inputs[number], rtol=1e-4, atol=1e-4)


def test_a_position_sees_itself_and_those_before_it_alone():
    parameters, tokens_BxT = random_parameters(), tokens()
    changed = tokens_BxT.copy()
    changed[:, 5] = (changed[:, 5] + 1) % CONFIG.vocab_size
    before, after = (np.asarray(language_model.logits(parameters, CONFIG, batch)) for batch in (tokens_BxT, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert np.all(np.abs(before[:, 5:] - after[:, 5:]).max(-1) > 1e-3)


def test_remat_changes_no_gradient():
    parameters, tokens_BxT = random_parameters(), tokens()

    def loss(parameters, remat):
        return jnp.sum(
            language_model.features(parameters, CONFIG, tokens_BxT, input_blocks=(2,), remat=remat)[0][..., 0] ** 2
        )

    kept, again = (jax.jit(jax.grad(loss), static_argnums=1)(parameters, remat) for remat in (False, True))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), kept, again)


def test_bfloat16_stays_near_float32_and_returns_float32():
    parameters = gpt2.init(CONFIG, jax.random.key(0))
    exact = language_model.features(parameters, CONFIG, tokens())[0]
    rounded = language_model.features(parameters, CONFIG, tokens(), compute_dtype=jnp.bfloat16)[0]
    assert rounded.dtype == jnp.float32
    difference = np.abs(exact - rounded).max()
    assert 0 < difference < 0.1


def test_initialization_is_that_of_gpt2():
    config = gpt2.GPT2Config(vocab_size=300, context_length=64, width=64, blocks=8, heads=4)
    parameters = gpt2.init(config, jax.random.key(3))
    assert all(array.dtype == jnp.float32 for array in jax.tree.leaves(parameters))
    blocks = parameters["h"]
    residual = 0.02 / np.sqrt(2 * config.blocks)
    for kernel, deviation in (
        (parameters["wte"]["embedding"], 0.02),
        (parameters["wpe"]["embedding"], 0.02),
        (blocks["attn"]["c_attn"]["kernel"], 0.02),
        (blocks["mlp"]["c_fc"]["kernel"], 0.02),
        (blocks["attn"]["c_proj"]["kernel"], residual),
        (blocks["mlp"]["c_proj"]["kernel"], residual),
    ):
        assert np.std(kernel) == pytest.approx(deviation, rel=0.05)
    assert not np.array_equal(blocks["mlp"]["c_fc"]["kernel"][0], blocks["mlp"]["c_fc"]["kernel"][1])
    assert np.all(blocks["ln_1"]["scale"] == 1)
    assert np.all(blocks["mlp"]["c_fc"]["bias"] == 0)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_every_array_has_logical_axes_and_a_mesh_changes_no_hidden_state(sizes):
    if jax.device_count() < 8:
        pytest.skip("needs eight devices")
    mesh = make_mesh(*sizes, devices=jax.devices()[:8])
    placed = Sharding(mesh).tree(gpt2.logical_axes(CONFIG))
    parameters, tokens_BxT = random_parameters(), tokens(sequences=8)
    divided = jax.device_put(parameters, placed)
    features = jax.jit(
        functools.partial(language_model.features, config=CONFIG, input_blocks=(2,)), static_argnames="activations"
    )
    expected, expected_inputs = features(parameters, tokens_BxT=tokens_BxT)
    batch = Sharding(mesh).named("batch", None, None)
    final, block_inputs = features(divided, tokens_BxT=tokens_BxT, activations=batch)
    np.testing.assert_allclose(final, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(block_inputs[2], expected_inputs[2], rtol=1e-4, atol=1e-4)
    assert final.sharding.is_equivalent_to(batch, 3)


def test_a_vocabulary_is_cut_where_a_mesh_divides_it():
    cut = gpt2.logical_axes(gpt2.GPT2Config(4096, 8, 16, 1, 2))["wte"]["embedding"]
    whole = gpt2.logical_axes(gpt2.GPT2Config(50257, 8, 16, 1, 2))["wte"]["embedding"]
    assert (cut, whole) == (("vocab", "embed"), (None, "embed"))


def test_an_input_block_outside_the_model_and_a_sequence_too_long_are_refused():
    parameters = random_parameters()
    with pytest.raises(ValueError, match="input_blocks"):
        language_model.features(parameters, CONFIG, tokens(), input_blocks=(4,))
    with pytest.raises(ValueError, match="context length"):
        language_model.features(parameters, CONFIG, tokens(length=13))
