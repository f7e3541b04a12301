"""A device against this machine's CPU and NumPy: an accelerator at its own sizes, a virtual CPU device at small ones.

`make accelerator` runs what is marked `accelerator`, with MLPMEM_TEST_DEVICES=accelerator.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_training_loop as training

from configs.default import get_config
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import LOCAL, Sharding
from mlpmem_jax.models import memory
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval import neighbors
from mlpmem_jax.retrieval.backends import KeySource
from mlpmem_jax.retrieval.exact_backend import ExactIndex
from mlpmem_jax.training import loop, step_benchmark
from mlpmem_jax.training.memory_task import MemoryLoss
from mlpmem_jax.training.state import Checkpoints
from mlpmem_jax.training.step_benchmark import Case

ON_ACCELERATOR = functools.partial(pytest.param, marks=pytest.mark.accelerator)


def device():
    """The device that is tested: never the CPU device that is the measure, not on a CPU either."""
    return jax.devices()[-1]


@pytest.mark.parametrize(
    "case",
    [
        Case(MemoryConfig("gpt2", 300, 384, 16, 32, 2, 64), positions=32, entries=8),
        Case(MemoryConfig("llama", 256, 256, 32, 32, 2, 64), positions=32, entries=8),
        ON_ACCELERATOR(Case(MemoryConfig("gpt2", 50257, 50304, 768, 768, 4, 3072), positions=512)),
        ON_ACCELERATOR(Case(MemoryConfig("llama", 49152, 49152, 576, 576, 4, 1536), positions=512)),
    ],
    ids=["gpt2", "llama", "gpt2, full width", "llama, full width"],
)
def test_logits_loss_and_gradients_are_the_cpu_s(case):
    batch = step_benchmark.batch(case)
    settings = step_benchmark.settings_of(case, get_config().training)
    settings.loss_chunk = 128
    loss = functools.partial(MemoryLoss(case.model, settings), LOCAL)

    def everything(parameters, batch):
        logits = memory.logits(parameters, case.model, batch["memory_inputs"])[:, : case.model.vocab_size]
        return logits, *jax.value_and_grad(loss, has_aux=True)(parameters, {}, batch)

    def on(where):
        with jax.default_device(where), jax.default_matmul_precision("highest"):
            return jax.tree.map(np.asarray, jax.jit(everything)(parameters, batch))

    with jax.default_device(jax.devices("cpu")[0]):
        parameters = jax.tree.map(np.asarray, memory.init(case.model, jax.random.key(0)))
    expected, actual = on(jax.devices("cpu")[0]), on(device())
    for one, other in zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-4 * np.abs(one).max())


@pytest.mark.parametrize(
    ("keys", "width", "k", "dtype"),
    [
        (1000, 16, 8, "float16"),
        (1000, 16, 8, "bfloat16"),
        ON_ACCELERATOR(200_000, 576, 64, "float16"),
        ON_ACCELERATOR(200_000, 576, 64, "bfloat16"),
    ],
)
def test_neighbors_are_those_of_a_sort(keys, width, k, dtype):
    random = np.random.default_rng(0)
    keys_NxD = np.asarray(random.standard_normal((keys, width), np.float32), jnp.dtype(dtype))
    source = KeySource(keys, width, jnp.dtype(dtype), lambda start, stop: keys_NxD[start:stop])
    queries = np.arange(0, keys, keys // 50)
    actual, ids = ExactIndex(source, make_mesh(devices=[device()])).search(
        keys_NxD[queries], k, np.stack([queries, queries + 1], axis=1)
    )
    exact_NxD = keys_NxD.astype(np.float32)
    distances = (exact_NxD[queries] ** 2).sum(1)[:, None] + (exact_NxD**2).sum(1) - 2 * exact_NxD[queries] @ exact_NxD.T
    distances[np.arange(len(queries)), queries] = np.inf
    np.testing.assert_allclose(actual, np.sort(distances, axis=1)[:, :k], rtol=1e-4, atol=1e-3)
    assert not (ids == queries[:, None]).any()
    assert (ids != neighbors.MISSING).all()
    np.testing.assert_allclose(np.take_along_axis(distances, ids, axis=1), actual, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("optimizer", ["adamw", ON_ACCELERATOR("muon")])
def test_a_checkpoint_comes_back_bit_for_bit_and_training_resumes(tmp_path, optimizer):
    sharding = Sharding(make_mesh(devices=[device()]))
    task = training.task(optimizer=optimizer)
    program = loop.step_program(task, sharding, steps=20)
    items = [training.Source()[index] for index in range(16)]
    batch = sharding.global_batch(jax.tree.map(lambda *rows: np.stack(rows), *items))
    state, _ = program.step(program.make_state(), {}, batch)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, state, 16, {"perplexity": 2.0})
    checkpoints.wait()
    restored, place = checkpoints.restore(1, program.abstract_state)
    checkpoints.close()
    assert place == 16
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    _, measured = program.step(restored, {}, batch)
    assert np.isfinite(float(measured["loss"]))
