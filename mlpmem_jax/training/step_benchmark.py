"""One train step of a memory with random weights, in JAX and in the reference implementation's PyTorch.

Both start from the same parameters and use the same batch, and their first losses must agree. The reference's targets
are dense: for every position, its collator fills a row of vocabulary size, which its loss then reads. Needs the
extra `torch`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np

from mlpmem_jax.core import chips
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.device_rates import matmul_rate
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.models import flops, memory
from mlpmem_jax.models.memory import MemoryConfig
from mlpmem_jax.training import loop
from mlpmem_jax.training.memory_task import MemoryLoss

ALPHA = 0.4
_ROUNDS = 5
_MOST_APART = {"float32": 1e-3, "bfloat16": 2e-2}  # maximum relative difference of the first losses


class Case(NamedTuple):
    """A train step.

    Attributes:
      model: dimensions of the memory.
      positions: positions in the batch.
      micro_batches: number of micro-batches, which fit CPU caches better; only in JAX.
      optimizer: one of core.config.OPTIMIZERS; the reference uses AdamW.
      dtype: dtype of matrix products.
      entries: stored probabilities per position.
    """

    model: MemoryConfig
    positions: int
    micro_batches: int = 1
    optimizer: str = "adamw"
    dtype: str = "float32"
    entries: int = 192

    @property
    def step_flops(self) -> int:
        """Model FLOPs of a step, not counting the optimizer's."""
        return 3 * flops.memory_forward(self.model) * self.positions


class Step(NamedTuple):
    """A train step that is ready to run; `run` executes it, waits for it, and returns its loss."""

    run: Callable[[], float]
    parameters: Any


def batch(case: Case) -> dict[str, np.ndarray]:
    """A random batch: distinct tokens per position, with probabilities that sum to 1."""
    random = np.random.default_rng(0)
    shape, vocabulary = (case.positions, case.entries), case.model.vocab_size
    weights = random.random(shape, np.float32)
    # One token from each of `entries` equal ranges of the vocabulary.
    span = vocabulary // case.entries
    return {
        "memory_inputs": random.standard_normal((case.positions, case.model.input_width), np.float32),
        "token_ids": (random.integers(0, span, shape) + span * np.arange(case.entries)).astype(np.int32),
        "probabilities": weights / weights.sum(1, keepdims=True),
        "next_tokens": random.integers(0, vocabulary, case.positions, np.int32),
    }


def settings_of(case: Case, training: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """The config group `training` with the case's values."""
    settings = ml_collections.ConfigDict(training)
    settings.update(
        {
            "mode": "offline",
            "alpha": ALPHA,
            "compute_dtype": case.dtype,
            "remat": False,
            "optimizer": case.optimizer,
            "warmup_steps": 0,
            "accumulation_steps": case.micro_batches,
        }
    )
    return settings


def jax_step(case: Case, training: ml_collections.ConfigDict) -> Step:
    """The compiled step of `training.loop` on the first device; `training` is the config group of that name."""
    sharding = Sharding(make_mesh(devices=jax.devices()[:1]))
    settings = settings_of(case, training)
    task = loop.TrainingTask(
        settings=settings,
        initialize=functools.partial(memory.init, case.model, jax.random.key(0)),
        abstract_parameters=memory.abstract_parameters(case.model),
        logical_axes=memory.logical_axes(case.model),
        loss=MemoryLoss(case.model, settings),
        positions_per_sequence=1,
        flops_per_position=case.step_flops / case.positions,
    )
    program = loop.step_program(task, sharding, steps=100)
    state, placed = program.make_state(), sharding.global_batch(batch(case))
    parameters = jax.tree.map(np.asarray, state["parameters"])

    def run() -> float:
        nonlocal state
        state, measured = program.step(state, {}, placed)
        jax.block_until_ready(state)
        return float(measured["loss"])

    return Step(run, parameters)


def torch_step(case: Case, parameters: dict, learning_rate: float = 5e-4) -> Step:
    """The reference's step in PyTorch, on the same kind of device as JAX's.

    Args:
      case: the step; the optimizer is always AdamW.
      parameters: the memory's parameters as NumPy arrays, named as in `memory.init`.
      learning_rate: AdamW's learning rate.

    Raises:
      UserError: PyTorch is not installed, or does not support that kind of device.
    """
    torch = require("torch", extra="torch")
    device = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if device == "tpu" or (device == "cuda" and not torch.cuda.is_available()):
        raise UserError(f"PyTorch has no {device} device here")
    functional = torch.nn.functional
    dtype, model = getattr(torch, case.dtype), case.model

    def leaf(array: np.ndarray):
        return torch.tensor(array, device=device, requires_grad=True)

    blocks = [
        jax.tree.map(lambda array, block=block: leaf(array[block]), parameters["h"]) for block in range(model.blocks)
    ]
    rest = {name: tree for name, tree in parameters.items() if name not in ("h", "lm_head")}
    rest = jax.tree.map(leaf, rest)
    head_VxD = leaf(np.ascontiguousarray(memory.output_kernel(parameters)[:, : model.vocab_size].T))
    leaves = [*jax.tree.leaves(blocks), *jax.tree.leaves(rest), head_VxD]
    optimizer = torch.optim.AdamW(leaves, lr=learning_rate, weight_decay=0.0)

    def norm(values: dict, x):
        if model.family == "llama":
            return functional.rms_norm(x, (model.width,), values["scale"], model.norm_epsilon)
        return functional.layer_norm(x, (model.width,), values["scale"], values["bias"], model.norm_epsilon)

    def linear(values: dict, x):
        return torch.addmm(values["bias"], x, values["kernel"]) if "bias" in values else x @ values["kernel"]

    def feed_forward(values: dict, x):
        if model.family == "llama":
            return linear(
                values["down_proj"], functional.silu(linear(values["gate_proj"], x)) * linear(values["up_proj"], x)
            )
        return linear(values["c_proj"], functional.gelu(linear(values["c_fc"], x), approximate="tanh"))

    def logits(x):
        if "embedding_transform" in rest:
            x = linear(rest["embedding_transform"], x)
        for block in blocks:
            x = x + feed_forward(block["mlp"], norm(block["norm"], x))
        return functional.linear(norm(rest["final_norm"], x), head_VxD)

    placed = {name: torch.tensor(array, device=device) for name, array in batch(case).items()}
    ids_NxE, next_N = placed["token_ids"].long(), placed["next_tokens"].long()

    def run() -> float:
        targets_NxV = torch.zeros(case.positions, model.vocab_size, device=device)
        targets_NxV.scatter_(1, ids_NxE, placed["probabilities"])
        with torch.autocast(device, dtype=dtype, enabled=case.dtype != "float32"):
            logits_NxV = logits(placed["memory_inputs"])
        log_NxV = functional.log_softmax(logits_NxV.float(), dim=-1)
        divergence = functional.kl_div(log_NxV, targets_NxV, reduction="batchmean")
        loss = ALPHA * divergence + (1 - ALPHA) * functional.cross_entropy(logits_NxV.float(), next_N)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        return loss.item()  # waits for the device

    return Step(run, leaves)


def _peak(dtype: str) -> float:
    """Peak FLOP/s of the device: published, or else measured each time, because other load changes it."""
    matmul_rate.cache_clear()
    published = chips.published(jax.devices()[0].device_kind)
    return published.flops if published else matmul_rate(dtype, seconds=0.2)


def compared_row(name: str, case: Case, training: ml_collections.ConfigDict) -> dict:
    """The rate of JAX's step relative to the reference's, or its utilization if PyTorch is unavailable.

    Each round measures both steps and a matrix product, so that other load affects them equally.

    Args:
      name: name of the row.
      case: the step.
      training: the config group of that name.

    Raises:
      UserError: the first losses differ, so the two steps do not compute the same.
    """
    ours = jax_step(case, training)
    losses, steps, absent = [ours.run()], [ours], ""
    try:
        steps.append(torch_step(case, ours.parameters))
        losses.append(steps[1].run())
    except UserError as error:
        absent = f"; PyTorch is left out: {error}"
    if len(losses) == 2 and not abs(losses[0] - losses[1]) <= _MOST_APART[case.dtype] * abs(losses[1]):
        raise UserError(f"{name}: the first loss is {losses[0]} in JAX and {losses[1]} in PyTorch; expected the same")
    for step in steps:
        step.run()  # JAX's optimizer states get their final layout, PyTorch allocates what it needs
    peaks_R, seconds = np.zeros(_ROUNDS), np.zeros((_ROUNDS, len(steps)))
    for round_ in range(_ROUNDS):
        peaks_R[round_] = _peak(case.dtype)
        for number, step in enumerate(steps):
            start = time.perf_counter()
            step.run()
            seconds[round_, number] = time.perf_counter() - start
    if not absent and (torch := require("torch", extra="torch")).cuda.is_available():
        steps.clear()
        torch.cuda.empty_cache()  # otherwise JAX could not use that memory
    rates = case.positions / np.median(seconds, axis=0)
    utilizations = np.median(case.step_flops / seconds / peaks_R[:, None], axis=0)
    against = "the published peak" if chips.published(jax.devices()[0].device_kind) else "the matmul rate"
    detail = (
        f"{case.dtype}, {case.positions:,} positions, {case.model.blocks} blocks, vocabulary "
        f"{case.model.vocab_size:,}, {case.entries} entries, AdamW; {rates[0]:,.0f} positions/s, "
        f"{utilizations[0]:.0%} of {against}, {np.median(peaks_R) / 1e12:.3g} TFLOP/s; medians of {_ROUNDS}{absent}"
    )
    if absent:
        return row(name, utilizations[0], f"of {against}", detail)
    detail += f"; the reference's step {rates[1]:,.0f} positions/s, {utilizations[1]:.0%}"
    ratio = np.median(seconds[:, 1] / seconds[:, 0])
    return row(name, ratio, "x PyTorch's rate", detail)
