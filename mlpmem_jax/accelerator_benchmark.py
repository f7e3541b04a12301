"""Rates of an accelerator at the paper's sizes: train steps, exact search, generation. Small sizes on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import ml_collections

from mlpmem_jax.inference import generation_benchmark as generation
from mlpmem_jax.models.gpt2 import GPT2Config
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.retrieval import exact_benchmark
from mlpmem_jax.training import step_benchmark
from mlpmem_jax.training.step_benchmark import Case

_DTYPE = "bfloat16"
_MEMORIES = {
    "124M": Case(MemoryConfig("gpt2", 50257, 50304, 768, 768, 18, 3072), positions=16384, dtype=_DTYPE),
    "774M": Case(MemoryConfig("gpt2", 50257, 50304, 1280, 1280, 54, 5120), positions=8192, dtype=_DTYPE),
    "1B": Case(MemoryConfig("llama", 32768, 32768, 4096, 4096, 8, 14336), positions=8192, dtype=_DTYPE),
}
_SMALL_MEMORIES = {
    "small": Case(MemoryConfig("gpt2", 257, 384, 32, 32, 2, 128), positions=64, dtype=_DTYPE, entries=16),
    "small, Llama": Case(MemoryConfig("llama", 256, 256, 16, 32, 2, 64), positions=64, dtype=_DTYPE, entries=16),
}
_SMALL_GENERATION = {
    "base": GPT2Config(vocab_size=257, context_length=64, width=32, blocks=2, heads=2),
    "memory_model": MemoryConfig("gpt2", 257, 384, 32, 32, 2, 128),
    "prompt": 32,
    "count": 8,
}
_LOSS_CHUNK = 4096


def rows(config: ml_collections.ConfigDict) -> Iterator[dict]:
    """Rows of (name, value, unit, detail). Sizes do not depend on the config."""
    is_small = jax.default_backend() == "cpu"
    training = ml_collections.ConfigDict(config.training)
    training.loss_chunk = _LOSS_CHUNK
    for name, case in (_SMALL_MEMORIES if is_small else _MEMORIES).items():
        yield step_benchmark.compared_row(f"train step, memory of {name}", case, training)
    yield from exact_benchmark.rows(config)
    yield from generation.rows(config, **(_SMALL_GENERATION if is_small else {}))
