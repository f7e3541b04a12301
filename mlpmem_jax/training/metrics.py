"""Training metrics: one JSON line a record, the same to TensorBoard, and the matmul rate to compare speed with."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from etils import epath

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends records to FOLDER/metrics.jsonl and, for local folders, to TensorBoard event files."""

    def __init__(self, folder, first_step: int):
        """Opens the files; records from `first_step` on, written by a run that was stopped later, are dropped."""
        self._enabled, self._lines = jax.process_index() == 0, []
        if not self._enabled:
            return
        self._file = epath.Path(folder) / FILE
        lines = self._file.read_text().splitlines() if self._file.exists() else []
        self._lines = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= first_step]
        self._board = None
        if "://" not in str(folder):
            import tensorboardX

            self._board = tensorboardX.SummaryWriter(str(epath.Path(folder) / "tensorboard"), purge_step=first_step)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records `values` (name to number) at `step`."""
        if not self._enabled:
            return
        self._lines.append(json.dumps({"step": step, **{name: float(value) for name, value in values.items()}}))
        self._file.write_text("\n".join(self._lines) + "\n")
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)

    def records(self) -> list[dict]:
        """All records of the run so far; of every process but the first, none."""
        return [json.loads(line) for line in self._lines]

    def close(self) -> None:
        if self._enabled and self._board is not None:
            self._board.close()


@functools.cache
def matmul_rate(dtype: str, size: int = 1536, seconds: float = 0.5) -> float:
    """FLOP/s of a square matrix product on one device: the rate that a train step is measured against.

    Args:
      dtype: of the factors, e.g. "float32"; the product is accumulated in float32.
      size: rows and columns.
      seconds: for how long the product is repeated; the fastest repetition counts.
    """
    key_a, key_b = jax.random.split(jax.random.key(0))
    a, b = (jax.random.normal(key, (size, size), dtype) for key in (key_a, key_b))
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    multiply(a, b).block_until_ready()
    best, deadline = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < deadline:
        start = time.perf_counter()
        multiply(a, b).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
