"""Schedules, AdamW, Muon and gradient accumulation against plain NumPy."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import gpt2, memory
from mlpmem_jax.training.optimizer import accumulated_value_and_grad, make_optimizer, schedule

AXES = {
    "embedding": ("vocab", "embed"),
    "h": {"kernel": ("layers", "embed", "mlp"), "bias": ("layers", "mlp"), "out": ("layers", "mlp", "embed")},
    "attention": ("layers", "embed", None, "heads", None),
    "queries": {"bias": ("layers", None, "heads", None)},
    "scale": (None,),
}
SHAPES = {
    "embedding": (7, 4),
    "h": {"kernel": (3, 4, 6), "bias": (3, 6), "out": (3, 6, 4)},
    "attention": (2, 4, 3, 2, 2),
    "queries": {"bias": (2, 3, 2, 2)},
    "scale": (4,),
}


def settings(**changes):
    values = {
        "optimizer": "adamw",
        "learning_rate": 0.1,
        "adam_learning_rate": 0.03,
        "schedule": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.0,
        "beta1": 0.9,
        "beta2": 0.95,
        "clip_norm": 0.0,
    }
    return ml_collections.ConfigDict(values | changes)


def random_tree(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32), SHAPES, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


def run(options, gradients, parameters, total_steps=10):
    optimizer = make_optimizer(options, total_steps, AXES)
    state = optimizer.init(parameters)
    for gradient in gradients:
        updates, state = jax.jit(optimizer.update)(gradient, state, parameters)
        parameters = optax.apply_updates(parameters, updates)
    return parameters


def assert_trees_close(actual, expected, rtol=1e-5, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), actual, expected)


def numpy_adam(gradients, parameter, rates, beta1, beta2, decay=0.0, nesterov=False):
    """Kingma and Ba 2015; decoupled decay of Loshchilov and Hutter 2019; Nesterov momentum of Dozat 2016."""
    parameter, first, second = parameter.astype(np.float64), 0.0, 0.0
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = gradient.astype(np.float64)
        first = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * gradient**2
        momentum = first / (1 - beta1**step)
        if nesterov:
            ahead = first / (1 - beta1 ** (step + 1))
            momentum = beta1 * ahead + (1 - beta1) * gradient / (1 - beta1**step)
        update = momentum / (np.sqrt(second / (1 - beta2**step)) + 1e-8) + decay * parameter
        parameter = parameter - rate * update
    return parameter


def numpy_newton_schulz(matrix):
    """Five quintic iterations towards the orthogonal factor (Jordan 2024)."""
    wide = matrix / np.linalg.norm(matrix)
    if matrix.shape[0] > matrix.shape[1]:
        wide = wide.T
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
    return wide.T if matrix.shape[0] > matrix.shape[1] else wide


def numpy_muon(gradients, matrix, rates, decay):
    """One matrix [inputs, outputs]; momentum 0.95 with Nesterov's look-ahead and bias correction."""
    matrix, momentum, beta = matrix.astype(np.float64), 0.0, 0.95
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        gradient = gradient.astype(np.float64)
        momentum = beta * momentum + (1 - beta) * gradient
        ahead = beta * momentum / (1 - beta ** (step + 1)) + (1 - beta) * gradient / (1 - beta**step)
        scale = np.sqrt(max(1, matrix.shape[1] / matrix.shape[0]))
        matrix = matrix - rate * (scale * numpy_newton_schulz(ahead) + decay * matrix)
    return matrix


def test_schedules():
    linear, cosine, constant = (
        schedule(settings(schedule=name, warmup_steps=4), 14) for name in ("linear", "cosine", "constant")
    )
    steps = np.arange(15)
    warmup = 0.1 * np.minimum(steps, 4) / 4
    rest = np.maximum(steps - 4, 0) / 10
    np.testing.assert_allclose([float(linear(n)) for n in steps], warmup * (1 - rest), atol=1e-7)
    np.testing.assert_allclose([float(cosine(n)) for n in steps], warmup * (1 + np.cos(np.pi * rest)) / 2, atol=1e-7)
    np.testing.assert_allclose([float(constant(n)) for n in steps], warmup, atol=1e-7)
    assert float(schedule(settings(warmup_steps=0), 5)(0)) == pytest.approx(0.1)


def test_adamw_equals_numpy_and_spares_norms_and_biases_the_decay():
    options = settings(weight_decay=0.2)
    parameters, gradients = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    rates = [0.1 * 0 / 2, 0.1 * 1 / 2, 0.1]
    decay = {"embedding": 0.2, "h": {"kernel": 0.2, "bias": 0.0, "out": 0.2}, "attention": 0.2, "scale": 0.0}
    decay["queries"] = {"bias": 0.0}
    expected = jax.tree.map(
        lambda decay, parameter, *steps: numpy_adam(steps, parameter, rates, 0.9, 0.95, decay),
        decay,
        parameters,
        *gradients,
    )
    assert_trees_close(run(options, gradients, parameters), expected)


def test_muon_equals_numpy():
    options = settings(optimizer="muon", weight_decay=0.2)
    parameters, gradients = random_tree(0), [random_tree(seed) for seed in (1, 2, 3)]
    actual = run(options, gradients, parameters)
    rates, adam_rates = [0.0, 0.05, 0.1], [0.0, 0.015, 0.03]

    for name in ("kernel", "out"):
        for layer in range(3):
            steps = [gradient["h"][name][layer] for gradient in gradients]
            expected = numpy_muon(steps, parameters["h"][name][layer], rates, 0.2)
            np.testing.assert_allclose(actual["h"][name][layer], expected, rtol=1e-4, atol=1e-5)
    for layer in range(2):
        for part in range(3):
            steps = [gradient["attention"][layer, :, part].reshape(4, 4) for gradient in gradients]
            expected = numpy_muon(steps, parameters["attention"][layer, :, part].reshape(4, 4), rates, 0.2)
            np.testing.assert_allclose(
                actual["attention"][layer, :, part].reshape(4, 4), expected, rtol=1e-4, atol=1e-5
            )
    for get in (lambda tree: tree["embedding"], lambda tree: tree["h"]["bias"], lambda tree: tree["scale"]):
        expected = numpy_adam([get(step) for step in gradients], get(parameters), adam_rates, 0.9, 0.95, nesterov=True)
        np.testing.assert_allclose(get(actual), expected, rtol=1e-4, atol=1e-5)


def taken_by_muon(config, module):
    axes = module.logical_axes(config)
    parameters = jax.eval_shape(lambda: module.init(config, jax.random.key(0)))
    state = jax.eval_shape(make_optimizer(settings(optimizer="muon"), 10, axes).init, parameters)
    momentum = state.inner_states["muon"].inner_state[0].mu
    return {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(momentum)
    }


def test_muon_takes_the_matrices_of_the_blocks_alone():
    base = gpt2.GPT2Config(vocab_size=16, context_length=8, width=8, blocks=2, heads=2)
    names = ("attn/c_attn", "attn/c_proj", "mlp/c_fc", "mlp/c_proj")
    assert taken_by_muon(base, gpt2) == {f"h/{name}/kernel" for name in names}
    options = {"vocab_size": 16, "padded_vocab_size": 16, "input_width": 4, "width": 8, "blocks": 2}
    for family, names in (("gpt2", ("c_fc", "c_proj")), ("llama", ("gate_proj", "up_proj", "down_proj"))):
        config = memory.MemoryConfig(family=family, feed_forward_width=16, **options)
        assert taken_by_muon(config, memory) == {f"h/mlp/{name}/kernel" for name in names}


def test_newton_schulz_is_batched_over_layers():
    optimizer = make_optimizer(settings(optimizer="muon"), 10, {"kernel": ("layers", "embed", "mlp")})

    def products(layers):
        parameters = {"kernel": jax.ShapeDtypeStruct((layers, 8, 16), jnp.float32)}
        state = jax.eval_shape(optimizer.init, parameters)
        text = jax.jit(optimizer.update).lower(parameters, state, parameters).as_text()
        return text.count("dot_general"), text.count("batching_dims = [0] x [0]")

    assert products(2) == products(12)
    assert len(set(products(12))) == 1


def test_clipping_scales_by_the_global_norm():
    parameters, gradient = random_tree(0), random_tree(1)
    norm = np.sqrt(sum((leaf.astype(np.float64) ** 2).sum() for leaf in jax.tree.leaves(gradient)))
    other = random_tree(2)
    clipped = run(settings(clip_norm=float(norm) / 2), [gradient, jax.tree.map(lambda g: g * 1e-3, other)], parameters)
    by_hand = [jax.tree.map(lambda g: g / 2, gradient), jax.tree.map(lambda g: g * 1e-3, other)]
    assert_trees_close(clipped, run(settings(), by_hand, parameters))


def linear_problem(rows, seed=0):
    rng = np.random.default_rng(seed)
    parameters = {"kernel": rng.normal(size=(4, 2)).astype(np.float32)}
    batch = {"x": rng.normal(size=(rows, 4)).astype(np.float32), "y": rng.normal(size=(rows, 2)).astype(np.float32)}

    def loss(parameters, frozen, batch):
        error = frozen * batch["x"] @ parameters["kernel"] - batch["y"]
        return (error**2).mean(), {"absolute": jnp.abs(error).mean()}

    return parameters, np.float32(1.5), batch, loss


@hypothesis.settings(max_examples=10, deadline=None)
@hypothesis.given(steps=st.integers(1, 5), size=st.integers(1, 4))
def test_micro_batches_equal_one_batch(steps, size):
    parameters, frozen, batch, loss = linear_problem(steps * size)
    expected = jax.value_and_grad(loss, has_aux=True)(parameters, frozen, batch)
    assert_trees_close(accumulated_value_and_grad(loss, steps)(parameters, frozen, batch), expected)


def test_micro_batches_of_a_sharded_batch_stay_on_their_devices():
    parameters, frozen, batch, loss = linear_problem(32)
    mesh = make_mesh(2, 4, 1)
    placed = jax.tree.map(lambda rows: jax.device_put(rows, Sharding(mesh).named("batch", None)), batch)
    parameters = jax.device_put(parameters, Sharding(mesh).named(None, None))
    program = jax.jit(accumulated_value_and_grad(loss, 4)).lower(parameters, frozen, placed).compile()
    text = program.as_text()
    assert not any(name in text for name in ("all-gather", "all-to-all", "collective-permute"))
    expected = jax.value_and_grad(loss, has_aux=True)(parameters, frozen, batch)
    assert_trees_close(program(parameters, frozen, placed), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"warmup_steps": 10}, "warmup_steps"), ({"schedule": "step"}, "schedule"), ({"optimizer": "sgd"}, "optimizer")],
)
def test_what_cannot_work_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        make_optimizer(settings(**changes), 10, AXES)
