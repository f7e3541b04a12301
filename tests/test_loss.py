"""The sparse chunked loss against float64 NumPy, on one device and on meshes of eight."""

import math
import re

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import LOCAL, RULES, Sharding
from mlpmem_jax.training.loss import sparse_cross_entropy


def make_problem(positions, width, vocab_size, padded, entries, seed=0):
    rng = np.random.default_rng(seed)
    ids = np.stack([rng.choice(vocab_size, entries, replace=False) for _ in range(positions)])
    probabilities = rng.dirichlet(np.full(max(entries, 1), 0.3), positions)[:, :entries].astype(np.float16)
    probabilities[rng.random(positions) < 0.1] = 0
    probabilities[:, 2:] *= rng.random((positions, max(entries - 2, 0))) < 0.7
    return {
        "hidden_NxD": rng.normal(size=(positions, width)).astype(np.float32),
        "kernel_DxV": rng.normal(size=(width, padded)).astype(np.float32),
        "token_ids_NxE": ids.reshape(positions, entries).astype(np.int32),
        "probabilities_NxE": probabilities.astype(np.float32),
        "next_tokens_N": rng.integers(0, vocab_size, positions).astype(np.int32),
    }


def oracle(problem, alpha, vocab_size):
    """Loss, KL, cross entropy and gradients with dense float64 targets, as the paper writes the loss."""
    hidden, kernel, ids, probabilities, labels = (np.asarray(value) for value in problem.values())
    positions = len(hidden)
    hidden, kernel = hidden.astype(np.float64), kernel.astype(np.float64)
    p_dense = np.zeros((positions, vocab_size))
    for row in range(positions):
        np.add.at(p_dense[row], ids[row], probabilities[row].astype(np.float64))
    p_dense /= np.maximum(p_dense.sum(1, keepdims=True), 1e-300)
    logits = hidden @ kernel[:, :vocab_size]
    log_q = logits - logits.max(1, keepdims=True)
    log_q -= np.log(np.exp(log_q).sum(1, keepdims=True))
    log_p = np.log(p_dense, where=p_dense > 0, out=np.zeros_like(p_dense))
    kl = (p_dense * (log_p - log_q)).sum(1).mean()
    cross_entropy = -log_q[np.arange(positions), labels].mean()
    one_hot = np.eye(vocab_size)[labels]
    has_entries = p_dense.sum(1, keepdims=True)
    d_logits = alpha * (np.exp(log_q) * has_entries - p_dense) + (1 - alpha) * (np.exp(log_q) - one_hot)
    d_logits /= positions
    d_kernel = np.zeros_like(kernel)
    d_kernel[:, :vocab_size] = hidden.T @ d_logits
    loss = alpha * kl + (1 - alpha) * cross_entropy
    return loss, kl, cross_entropy, d_logits @ kernel[:, :vocab_size].T, d_kernel


def loss_and_gradients(problem, sharding=LOCAL, **options):
    rest = {name: value for name, value in problem.items() if name not in ("hidden_NxD", "kernel_DxV")}

    def loss(hidden_NxD, kernel_DxV):
        return sparse_cross_entropy(hidden_NxD, kernel_DxV, **rest, sharding=sharding, **options)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(problem["hidden_NxD"], problem["kernel_DxV"])


def assert_matches(actual, expected, tolerance=2e-5):
    (loss, statistics), gradients = actual
    np.testing.assert_allclose(loss, expected[0], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(statistics["kl"], expected[1], rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(statistics["cross_entropy"], expected[2], rtol=tolerance, atol=tolerance)
    for gradient, wanted in zip(gradients, expected[3:], strict=True):
        scale = np.abs(wanted).max() + 1e-12
        np.testing.assert_allclose(np.asarray(gradient, np.float64) / scale, wanted / scale, atol=tolerance)


@hypothesis.settings(max_examples=12, deadline=None)  # each is compiled
@hypothesis.given(
    positions=st.integers(1, 9),
    width=st.integers(1, 6),
    vocab_size=st.integers(3, 12),
    padding=st.integers(0, 4),
    entries=st.integers(0, 3),
    chunk=st.integers(1, 12),
    alpha=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_equals_float64_numpy(positions, width, vocab_size, padding, entries, chunk, alpha, seed):
    problem = make_problem(positions, width, vocab_size, vocab_size + padding, entries, seed)
    actual = loss_and_gradients(problem, alpha=alpha, vocab_size=vocab_size, chunk=chunk)
    assert_matches(actual, oracle(problem, alpha, vocab_size))


def test_gradients_equal_finite_differences():
    problem = make_problem(6, 4, 9, 10, 3)
    _, gradients = loss_and_gradients(problem, alpha=0.4, vocab_size=9, chunk=4)
    rng = np.random.default_rng(1)
    for name, gradient in zip(("hidden_NxD", "kernel_DxV"), gradients, strict=True):
        direction = rng.normal(size=gradient.shape)
        steps = []
        for sign in (1, -1):
            moved = dict(problem)
            moved[name] = problem[name].astype(np.float64) + sign * 1e-5 * direction
            steps.append(oracle(moved, 0.4, 9)[0])
        np.testing.assert_allclose((direction * np.asarray(gradient)).sum(), (steps[0] - steps[1]) / 2e-5, rtol=1e-4)


def test_the_loss_alone_equals_the_differentiated_one():
    problem = make_problem(7, 4, 9, 10, 3)
    options = {"alpha": 0.4, "vocab_size": 9, "chunk": 3}
    (differentiated, statistics), _ = loss_and_gradients(problem, **options)
    loss, alone = jax.jit(lambda arrays: sparse_cross_entropy(**arrays, **options))(problem)
    np.testing.assert_allclose([loss, alone["kl"]], [differentiated, statistics["kl"]], rtol=1e-6)


def test_gradients_follow_the_cotangent():
    problem = make_problem(7, 4, 9, 10, 3)
    rest = {name: value for name, value in problem.items() if name != "kernel_DxV"}

    def scaled(kernel_DxV):
        return 3 * sparse_cross_entropy(**rest, kernel_DxV=kernel_DxV, alpha=0.4, vocab_size=9, chunk=3)[0]

    np.testing.assert_allclose(
        jax.grad(scaled)(problem["kernel_DxV"]), 3 * oracle(problem, 0.4, 9)[4], rtol=1e-4, atol=1e-6
    )


def test_probabilities_that_do_not_sum_to_one_are_renormalized():
    problem = make_problem(5, 4, 9, 9, 3)
    scaled = {**problem, "probabilities_NxE": problem["probabilities_NxE"] * 0.37}
    options = {"alpha": 0.6, "vocab_size": 9, "chunk": 5}
    for first, second in zip(
        jax.tree.leaves(loss_and_gradients(problem, **options)),
        jax.tree.leaves(loss_and_gradients(scaled, **options)),
        strict=True,
    ):
        np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-6)


def test_bfloat16_gradients_are_near_float64():
    problem = make_problem(64, 16, 40, 48, 4)
    rounded = {**problem, "hidden_NxD": jnp.asarray(problem["hidden_NxD"], jnp.bfloat16)}
    actual = loss_and_gradients(rounded, alpha=0.4, vocab_size=40, chunk=24)
    assert actual[1][0].dtype == jnp.bfloat16
    assert actual[1][1].dtype == jnp.float32
    exact = {name: np.asarray(value, np.float32) for name, value in rounded.items() if name != "next_tokens_N"}
    exact |= {"token_ids_NxE": problem["token_ids_NxE"], "next_tokens_N": problem["next_tokens_N"]}
    exact["kernel_DxV"] = np.asarray(jnp.asarray(problem["kernel_DxV"], jnp.bfloat16), np.float32)
    assert_matches(actual, oracle(exact, 0.4, 40), tolerance=0.02)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 2, 4), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize("chunk", [3, 100])
def test_every_mesh_gives_the_same(sizes, chunk):
    sharding = Sharding(make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)]))
    problem = make_problem(32, 8, 37, 40, 5)
    placed = {
        name: jax.device_put(
            value,
            sharding.named("embed", "vocab") if name == "kernel_DxV" else sharding.rows(value.ndim),
        )
        for name, value in problem.items()
    }
    actual = loss_and_gradients(placed, sharding, alpha=0.4, vocab_size=37, chunk=chunk)
    assert_matches(actual, oracle(problem, 0.4, 37))
    assert actual[1][1].sharding.is_equivalent_to(sharding.named("embed", "vocab"), 2)
    rows = jax.sharding.PartitionSpec(("slice", "fsdp", "tensor"))
    assert actual[1][0].sharding.is_equivalent_to(jax.sharding.NamedSharding(sharding.mesh, rows), 2)


def test_positions_that_the_vocabulary_axes_do_not_divide_give_the_same():
    problem = make_problem(6, 8, 37, 40, 5)
    actual = loss_and_gradients(problem, Sharding(make_mesh(1, 2, 4)), alpha=0.4, vocab_size=37, chunk=2)
    assert_matches(actual, oracle(problem, 0.4, 37))


def test_a_vocabulary_that_the_mesh_does_not_divide_gives_the_same():
    problem = make_problem(16, 8, 37, 37, 3)
    actual = loss_and_gradients(problem, Sharding(make_mesh(1, 2, 4)), alpha=0.4, vocab_size=37, chunk=4)
    assert_matches(actual, oracle(problem, 0.4, 37))


def compiled_gradients(positions, width, vocab_size, entries, chunk, sharding=LOCAL):
    """The compiled program of loss and gradients, from shapes alone."""

    def shape(dims, dtype, *axes):
        return jax.ShapeDtypeStruct(dims, dtype, sharding=None if sharding is LOCAL else sharding.named(*axes))

    def loss(hidden_NxD, kernel_DxV, token_ids_NxE, probabilities_NxE, next_tokens_N):
        return sparse_cross_entropy(
            hidden_NxD, kernel_DxV, token_ids_NxE, probabilities_NxE, next_tokens_N,
            alpha=0.4, vocab_size=vocab_size, chunk=chunk, sharding=sharding,
        )  # fmt: skip

    return (
        jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
        .lower(
            shape((positions, width), jnp.float32, "batch", None),
            shape((width, vocab_size), jnp.float32, "embed", "vocab"),
            shape((positions, entries), jnp.int32, "batch", None),
            shape((positions, entries), jnp.float32, "batch", None),
            shape((positions,), jnp.int32, "batch"),
        )
        .compile()
    )


def test_temporary_memory_grows_with_the_chunk_not_with_the_batch():
    width, vocab_size, entries = 8, 4096, 4

    def temporaries(positions, chunk):
        return compiled_gradients(positions, width, vocab_size, entries, chunk).memory_analysis().temp_size_in_bytes

    few, many = temporaries(1024, 64), temporaries(8192, 64)
    dense_logits = 8192 * vocab_size * 4
    assert many < dense_logits / 20
    assert many - few < 7168 * 4 * 6 * (width + entries)
    assert temporaries(8192, 256) - many > 150 * vocab_size * 4


def test_kernel_gradient_is_reduce_scattered_and_the_vocabulary_never_gathered():
    positions, width, vocab_size = 64, 16, 512
    text = compiled_gradients(positions, width, vocab_size, 4, 8, Sharding(make_mesh(2, 2, 2))).as_text()
    scattered = re.findall(r"= f32\[(\d+),(\d+)\]\S* reduce-scatter\(", text)
    assert set(scattered) == {(str(width // 2), str(vocab_size // 2)), (str(positions // 8), str(width))}
    gathered = re.findall(r"= f32\[(\d+),(\d+)\]\S* all-gather\(", text)
    assert set(gathered) == {(str(width), str(vocab_size // 2)), (str(positions // 4), str(width))}
    assert f",{vocab_size}]" not in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha"),
        ({"chunk": 0}, "chunk"),
        ({"vocab_size": 50}, "columns"),
        ({"sharding": ((8, 1, 1), RULES)}, "positions of 12"),
        ({"sharding": ((2, 2, 2), {**RULES, "embed": "tensor"})}, "embed"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    options = {"alpha": 0.4, "vocab_size": 40, "chunk": 4} | options
    problem = make_problem(12, 8, 37, 40, 2)
    if "sharding" in options:
        sizes, rules = options["sharding"]
        options["sharding"] = Sharding(make_mesh(*sizes), rules)
    with pytest.raises(ConfigError, match=message):
        sparse_cross_entropy(**problem, **options)
