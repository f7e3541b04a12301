"""Rates of the memory's train step in one process and in several, on the same cores.

A multi-process job cannot be started from inside one of its processes, so each measurement is a separate job: this
module run as a program, once per process.
"""

from __future__ import annotations

import json
import os
import socket
import statistics
import subprocess
import sys
import time

import jax
import ml_collections
import numpy as np

from mlpmem_jax.core import distributed, host
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.training import loop, train_base
from mlpmem_jax.training.memory_task import dimensions, memory_task

_ENTRIES = 64  # per target distribution
_ROUNDS, _STEPS = 5, 10
_JOBS = ((1, 1), (1, 2), (2, 1))  # (processes, virtual devices per process)


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Positions per second of every job, as medians of interleaved runs, relative to one process with one device."""
    rates = {job: [] for job in _JOBS}
    for _ in range(_ROUNDS):
        for processes, devices in _JOBS:
            rates[processes, devices].append(_measure(config, processes, devices))
    first = statistics.median(rates[_JOBS[0]])
    result = []
    for (processes, devices), measured in rates.items():
        rate = statistics.median(measured)
        result.append(
            row(
                f"train step, {processes} x {devices} (processes x devices)",
                rate / first,
                "of the rate of 1 x 1",
                f"{rate:,.0f} positions/s ({min(measured):,.0f} to {max(measured):,.0f} in {_ROUNDS} runs of "
                f"{_STEPS} steps), memory of width {config.memory.width}, {config.training.optimizer}, "
                f"{config.training.batch_sequences * config.base.context_length} positions per step",
            )
        )
    return result


def _measure(config: ml_collections.ConfigDict, processes: int, devices: int) -> float:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for index in range(processes):
        environment = {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, "-m", __name__, config.to_json_best_effort()]
        started.append(subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True))
    outputs = [process.communicate()[0] for process in started]
    if failed := [process.returncode for process in started if process.returncode]:
        raise UserError(f"benchmark of {processes} processes: one exited with code {failed[0]}; its error is above")
    return float(outputs[0].splitlines()[-1])


def _positions_per_second(config: ml_collections.ConfigDict) -> float:
    sharding = Sharding.of(config)
    part = sharding.batch_part
    model = dimensions(config, config.tokenizer.vocab_size, config.base.width, sharding.mesh.shape["tensor"])
    base = train_base.dimensions(config, model.vocab_size)
    config.training.warmup_steps = 1
    program = loop.step_program(memory_task(config, model, base, sharding), sharding, steps=1000)
    step, state = program.step, program.make_state()

    length = config.base.context_length
    positions = config.training.batch_sequences * length
    random, count = np.random.default_rng(part.index), config.training.batch_sequences // part.count
    weights = random.random((count, length, _ENTRIES), np.float32)
    rows = {
        "memory_inputs": random.normal(size=(count, length, config.base.width)).astype(config.datastore.dtype),
        "token_ids": random.integers(0, model.vocab_size, weights.shape).astype(np.int32),
        "probabilities": weights / weights.sum(-1, keepdims=True),
        "next_tokens": random.integers(0, model.vocab_size, (count, length)).astype(np.int32),
    }
    for _ in range(2):
        state, measured = step(state, {}, sharding.global_batch(rows))
    jax.block_until_ready(measured)
    start = time.perf_counter()
    for _ in range(_STEPS):
        state, measured = step(state, {}, sharding.global_batch(rows))
    jax.block_until_ready((state, measured))
    return _STEPS * positions / (time.perf_counter() - start)


if __name__ == "__main__":
    host.keep_freed_memory()
    distributed.join_job()
    print(_positions_per_second(ml_collections.ConfigDict(json.loads(sys.argv[1]))))
