"""Training rates of this machine: the train step relative to the matmul rate, the input pipeline, the loss's memory."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.device_rates import matmul_rate
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval.distribution import SparseDistributions
from mlpmem_jax.retrieval.targets_artifact import TargetsWriter, array_specs, folder_of
from mlpmem_jax.training import data, step_benchmark
from mlpmem_jax.training.loss import sparse_cross_entropy
from mlpmem_jax.training.step_benchmark import Case

INPUT_WIDTH, VOCABULARY, ENTRIES = 64, 4096, 64


def _model(width: int) -> MemoryConfig:
    return MemoryConfig("gpt2", VOCABULARY, VOCABULARY, INPUT_WIDTH, width, 4, 4 * width)


STEPS = (
    # Micro-batches, so that what they write stays in a CPU's caches.
    Case(_model(256), positions=8192, micro_batches=8, optimizer="muon", entries=ENTRIES),
    Case(_model(256), positions=8192, micro_batches=8, entries=ENTRIES),
    Case(_model(768), positions=16384, micro_batches=8, entries=ENTRIES),
)
REAL = {
    # Vocabularies of real models, for which the loss is most of a step.
    "SmolLM2's memory": Case(MemoryConfig("llama", 49152, 49152, 576, 576, 4, 1536), positions=2048),
    "GPT-2's, 4 blocks": Case(MemoryConfig("gpt2", 50257, 50304, 768, 768, 4, 3072), positions=2048),
}


def _train_step_row(config: ml_collections.ConfigDict, case: Case) -> tuple[dict, float]:
    """A row from the median of five steps and the matmul rate measured just before; and positions per second."""
    step = step_benchmark.jax_step(case, config.training)
    step.run()
    rates, seconds = [], []
    for _ in range(5):
        matmul_rate.cache_clear()
        rates.append(matmul_rate("float32", seconds=0.2))
        start = time.perf_counter()
        step.run()
        seconds.append(time.perf_counter() - start)
    rate = case.positions / statistics.median(seconds)
    shares = [case.step_flops / duration / rate for duration, rate in zip(seconds, rates, strict=True)]
    measured = row(
        f"train step, width {case.model.width}, {case.optimizer}",
        statistics.median(shares),
        "of the matmul rate",
        f"float32, {case.positions} positions in {case.micro_batches} micro-batches, 4 blocks, vocabulary "
        f"{VOCABULARY}, {ENTRIES} entries; {rate:,.0f} positions/s, "
        f"{case.step_flops / statistics.median(seconds) / 1e9:.0f} of "
        f"{statistics.median(rates) / 1e9:.0f} GFLOP/s, medians of 5; the optimizer's FLOPs are not counted",
    )
    return measured, rate


def _batch(positions: int) -> dict:
    return step_benchmark.batch(STEPS[0]._replace(positions=positions))


def _write_sample(folder: epath.Path, sequences: int, length: int):
    """Writes a datastore and targets with random content, shaped like the quickstart's."""
    random = np.random.default_rng(0)
    store = ArtifactWriter.create(
        folder / "datastore",
        "datastore",
        {},
        {},
        {
            "keys": ArraySpec((sequences, length, INPUT_WIDTH), "float16", 128, (1, length, INPUT_WIDTH)),
            "next_tokens": ArraySpec((sequences, length), "int32", 128, (1, length)),
        },
    )
    for shard in range(sequences // 128):
        keys = random.normal(size=(128, length, INPUT_WIDTH)).astype(np.float16)
        following = random.integers(0, VOCABULARY, (128, length))
        store.write_shard(shard, {"keys": keys, "next_tokens": following})
    datastore = store.seal({})
    writer = TargetsWriter(folder_of(folder, "train"), {}, {}, array_specs(datastore, "uint16", ENTRIES))
    for shard in range(sequences // 128):
        counts_N = random.integers(1, ENTRIES * 2 // 3, 128 * length)
        counts_N[0] = ENTRIES
        ends_N1 = np.concatenate([[0], np.cumsum(counts_N)])
        ids_M = random.integers(0, VOCABULARY, ends_N1[-1], np.int32)
        probabilities_M = random.random(ends_N1[-1], np.float32)
        zeros_N = np.zeros(len(counts_N), np.float32)
        writer.write_shard(shard, [SparseDistributions(ends_N1, ids_M, probabilities_M, zeros_N, zeros_N)])
    return datastore, writer.seal({})


def _pipeline_row(consumed: float) -> dict:
    """Positions per second of the input pipeline with nothing else running; a train step uses `consumed`."""
    length, batch_sequences = 128, 32
    with tempfile.TemporaryDirectory() as folder:
        source = data.TargetSource(*_write_sample(epath.Path(folder), 1024, length))
        batches = data.batches(source, batch_sequences, seed=0)
        for _ in range(4):
            next(batches)
        start, count = time.perf_counter(), 40
        for _ in range(count):
            next(batches)
        rate = count * batch_sequences * length / (time.perf_counter() - start)
        batches.close()
    return row(
        "input pipeline",
        rate,
        "positions/s",
        f"Grain over TensorStore, {length} positions per sequence, up to {ENTRIES} entries each, nothing else running; "
        f"{rate / consumed:.1f}x what the train step at width 256 consumes",
    )


def _loss_memory_rows() -> list[dict]:
    """Temporary memory of the compiled loss and its gradient, by batch and by chunk."""
    model = _model(256)
    rows = []
    for positions, chunk in ((4096, 256), (16384, 256), (4096, 1024), (16384, 1024)):

        def gradient(hidden_NxD, kernel_DxV, batch, chunk=chunk):
            def loss(hidden_NxD, kernel_DxV):
                return sparse_cross_entropy(
                    hidden_NxD,
                    kernel_DxV,
                    batch["token_ids"],
                    batch["probabilities"],
                    batch["next_tokens"],
                    alpha=0.4,
                    vocab_size=VOCABULARY,
                    chunk=chunk,
                )[0]

            return jax.grad(loss, argnums=(0, 1))(hidden_NxD, kernel_DxV)

        shapes = (
            jax.ShapeDtypeStruct((positions, model.width), jnp.float32),
            jax.ShapeDtypeStruct((model.width, VOCABULARY), jnp.float32),
            jax.eval_shape(lambda positions=positions: jax.tree.map(jnp.asarray, _batch(positions))),
        )
        compiled = jax.jit(gradient).lower(*shapes).compile()
        logits = positions * VOCABULARY * 4 / 2**20
        rows.append(
            row(
                f"loss memory, {positions} positions, chunk {chunk}",
                compiled.memory_analysis().temp_size_in_bytes / 2**20,
                "MiB",
                f"temporaries of the compiled gradient; the logits of the whole batch would be {logits:.0f} MiB",
            )
        )
    return rows


def rows(config: ml_collections.ConfigDict) -> Iterator[dict]:
    """Rows of (name, value, unit, detail)."""
    yield row("matmul", matmul_rate("float32") / 1e9, "GFLOP/s", "float32, 1536 x 1536 x 1536, best of half a second")
    consumed = []
    for case in STEPS:
        measured, rate = _train_step_row(config, case)
        consumed.append(rate)
        yield measured
    for name, case in REAL.items():
        yield step_benchmark.compared_row(f"train step, {name}", case, config.training)
    yield _pipeline_row(consumed[0])
    yield from _loss_memory_rows()
