"""The training loop. `fit` trains the base LM, the memory and the controls; it reads from top to bottom."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.experimental import multihost_utils

from mlpmem_jax.core import preemption, stage_costs
from mlpmem_jax.core.config import check_profile, plain_dict, profiled_steps
from mlpmem_jax.core.device_rates import peak_rate
from mlpmem_jax.core.errors import ConfigError, Stopped, UserError
from mlpmem_jax.core.mesh import compiler_options
from mlpmem_jax.core.progress import progress, say
from mlpmem_jax.core.sharding import LOCAL, Sharding, placed_shapes
from mlpmem_jax.models.interpolation import NotANumber
from mlpmem_jax.training import data, goodput, profile
from mlpmem_jax.training.metrics import MetricsWriter
from mlpmem_jax.training.optimizer import (
    accumulated_value_and_grad,
    averaged_over_devices,
    make_optimizer,
    schedule,
    shared_by_layers,
)
from mlpmem_jax.training.state import METRIC, Checkpoints, initial_state, state_shardings

_LOG_EVERY = 20  # steps between records of the training loss
_AHEAD = 2  # steps that are queued on the device while one runs; more would delay stopping and the progress display
_NOT_IN_ORIGIN = (
    "accumulation_steps",
    "remat",
    "loss_chunk",
    "checkpoint_every",
    "evaluate_every",
    "profile_steps",
)


def origin(settings: ml_collections.ConfigDict) -> dict:
    """The training settings that determine the parameters, as stored in manifests.

    The other settings only affect memory, time or output, so a run that ran out of memory may resume with other values.
    """
    return {key: value for key, value in plain_dict(settings).items() if key not in _NOT_IN_ORIGIN}


@dataclasses.dataclass(frozen=True)
class TrainingTask:
    """What one optimizer step computes.

    Attributes:
      settings: a config group made by `optimization` of configs/default.py.
      initialize: creates the parameters from the result of `Run.start` (traced, so that they are created sharded).
      abstract_parameters: their shapes and dtypes, a tree of jax.ShapeDtypeStruct.
      logical_axes: tree of logical axis names, one tuple per parameter.
      loss: (sharding, parameters, frozen, batch) -> (loss, {name: statistic}), float32 scalars, means over the batch;
        the sharding applies to parameters and batch.
      positions_per_sequence: positions per sequence, for throughput.
      flops_per_position: FLOPs of a train step, forward and backward, from the model's dimensions.
    """

    settings: ml_collections.ConfigDict
    initialize: Callable[..., Any]
    abstract_parameters: Any
    logical_axes: Any
    loss: Callable
    positions_per_sequence: int
    flops_per_position: float


@dataclasses.dataclass(frozen=True)
class Run:
    """The data and folder of a training run.

    Attributes:
      name: label for progress output.
      folder: the artifact's folder, for checkpoints and metrics.
      source: random-access sequences.
      validate: parameters -> {"perplexity": ..., other metrics}; parameters with the lowest perplexity are kept.
      frozen: tree of arrays that the loss reads but training does not change (the base LM, online).
      start: loads arrays from which the parameters are initialized, if not all are random; not called when a run
        resumes. The arrays may span processes, so they are arguments of the compiled program; they are released once
        the state is created.
    """

    name: str
    folder: str
    source: Any
    validate: Callable[[Any], dict[str, float]]
    frozen: Any = dataclasses.field(default_factory=dict)
    start: Callable[[], tuple] = tuple


def total_steps(settings: ml_collections.ConfigDict, sequences: int) -> int:
    """The number of optimizer steps for the settings and a split of `sequences` sequences.

    Raises:
      ConfigError: the split has less than one batch, or the epochs amount to less than one step or too many.
    """
    if sequences < settings.batch_sequences:
        raise ConfigError(
            f"batch_sequences: {settings.batch_sequences} sequences per step, but the training split has only "
            f"{sequences}; lower batch_sequences, or provide more text"
        )
    steps = settings.steps or round(settings.epochs * sequences / settings.batch_sequences)
    if steps < 1:
        raise ConfigError(f"epochs: {settings.epochs} epochs of {sequences} sequences amount to less than one step")
    if steps >= 2**31:  # they are counted in int32
        raise ConfigError(f"epochs: {settings.epochs} epochs of {sequences} sequences amount to 2**31 steps or more")
    return steps


def check_batch(settings: ml_collections.ConfigDict, sharding: Sharding, group: str) -> None:
    """Refuses a batch that the mesh cannot divide.

    Raises:
      ConfigError: the batch is not divisible; names both sizes.
    """
    shards = sharding.shards("batch")
    micro_batch = settings.batch_sequences // settings.accumulation_steps
    if micro_batch % shards:
        raise ConfigError(
            f"config.{group}.batch_sequences: {settings.batch_sequences} over {settings.accumulation_steps} "
            f"accumulation steps is {micro_batch} sequences, which {shards} batch shards of the mesh do not divide; "
            f"use a multiple of {shards * settings.accumulation_steps}, or a larger config.mesh.tensor, for fewer "
            "shards (mlpmem plan --meshes compares them)"
        )


@contextlib.contextmanager
def _stop_requests() -> Iterator[Callable[[int], bool]]:
    """Yields a function of the step that returns whether the job was preempted.

    Requests are SIGTERM, a preemption notice, and the first Ctrl-C. A second Ctrl-C ends the process at once.
    """
    is_requested = False

    def note(signum, frame):
        nonlocal is_requested
        is_requested = True

    def interrupt(signum, frame):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        say("stopping after this step, with a checkpoint; press Ctrl-C again to stop at once, without one")
        os.kill(os.getpid(), signal.SIGTERM)  # handled like any other stop request

    is_alone = jax.process_count() == 1
    handlers = {signal.SIGINT: interrupt} | ({signal.SIGTERM: note} if is_alone else {})
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    try:
        # With several processes, JAX's own handler catches SIGTERM, and all of them agree on the step.
        with contextlib.nullcontext() if is_alone else preemption.deferred():
            yield (lambda step: is_requested) if is_alone else multihost_utils.reached_preemption_sync_point
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def train_step(task: TrainingTask, optimizer: optax.GradientTransformation, parameter_shardings, sharding: Sharding):
    """One optimizer step as a function (state, frozen, batch) -> (state, statistics), to be jitted."""
    micro_batches = task.settings.accumulation_steps
    whole = not sharding.is_local and all(placed.is_fully_replicated for placed in jax.tree.leaves(parameter_shardings))
    if whole:
        loss = functools.partial(task.loss, LOCAL)
        value_and_grad = averaged_over_devices(accumulated_value_and_grad(loss, micro_batches), sharding)
    else:
        value_and_grad = accumulated_value_and_grad(functools.partial(task.loss, sharding), micro_batches)

    def step(state, frozen, batch):
        (loss, statistics), gradients = value_and_grad(state["parameters"], frozen, batch)
        # With the parameters' sharding, gradients are reduce-scattered instead of all-reduced.
        gradients = jax.lax.with_sharding_constraint(gradients, parameter_shardings)
        with jax.named_scope("optimizer"):
            updates, optimizer_state = optimizer.update(gradients, state["optimizer"], state["parameters"])
            if whole and task.settings.optimizer == "muon":
                updates = shared_by_layers(updates, task.logical_axes, sharding)
            parameters = optax.apply_updates(state["parameters"], updates)
        measured = {"loss": loss, **statistics, "gradient_norm": optax.tree.norm(gradients)}
        return {"parameters": parameters, "optimizer": optimizer_state, "step": state["step"] + 1}, measured

    return step


class StepProgram(NamedTuple):
    """The programs of a training run on a mesh, jitted but not yet compiled.

    Attributes:
      make_state: result of `Run.start` -> the initial state, sharded over the mesh.
      step: (state, frozen, batch) -> (state, statistics); the old state is donated.
      abstract_state: shapes, dtypes and shardings of the state.
    """

    make_state: Callable[..., Any]
    step: Callable[[Any, Any, Any], tuple[Any, dict[str, jax.Array]]]
    abstract_state: Any


def step_program(task: TrainingTask, sharding: Sharding, steps: int) -> StepProgram:
    """The program of one optimizer step of a run of `steps`."""
    optimizer = make_optimizer(task.settings, steps, task.logical_axes)
    abstract = jax.eval_shape(functools.partial(initial_state, optimizer=optimizer), task.abstract_parameters)
    parameter_shardings = sharding.tree(task.logical_axes, abstract["parameters"])
    shardings = state_shardings(sharding, abstract, parameter_shardings)
    return StepProgram(
        make_state=jax.jit(lambda *start: initial_state(task.initialize(*start), optimizer), out_shardings=shardings),
        step=jax.jit(
            train_step(task, optimizer, parameter_shardings, sharding),
            donate_argnums=0,
            out_shardings=(shardings, None),
            compiler_options=compiler_options(sharding.mesh),
        ),
        abstract_state=placed_shapes(abstract, shardings),
    )


def fit(task: TrainingTask, run: Run, sharding: Sharding) -> tuple[Any, dict[str, float]]:
    """Trains from the latest checkpoint, or from the start, to the end of the schedule.

    Returns:
      The parameters with the lowest validation perplexity, and their metrics (including "step").

    Raises:
      UserError: the loss, its gradient, the parameters or the validation are no longer finite; names the step.
      Stopped: the job was preempted; a checkpoint has been written.
    """
    settings = task.settings
    watch = goodput.Stopwatch(stage_costs.start_time())
    steps = total_steps(settings, len(run.source))
    check_profile("profile_steps", settings.profile_steps, steps)
    learning_rate = schedule(settings, steps)
    program = step_program(task, sharding, steps)
    checkpoints = Checkpoints(run.folder)
    start = checkpoints.latest_step() or 0
    if start:
        say(f"{run.name}: resumes from the checkpoint at step {start} of {steps}")
        watch.lap("start-up")
        state, next_sequence = checkpoints.restore(start, program.abstract_state)
        watch.lap("restore")
    else:
        state, next_sequence = program.make_state(*run.start()), 0

    part = sharding.batch_part
    batches = data.batches(run.source, settings.batch_sequences, settings.seed, part.index, part.count)
    batches.set_state({"next_index": next_sequence // settings.batch_sequences})
    positions_per_step = settings.batch_sequences * task.positions_per_sequence
    peak = peak_rate(settings.compute_dtype) * jax.device_count()
    unchecked: list[tuple[int, dict[str, jax.Array]]] = []
    watch.lap("start-up")
    logged, training, waiting = start, 0.0, 0.0  # step of the last record, and seconds until then
    shown, note = start, ""

    with (
        _stop_requests() as must_stop,
        contextlib.closing(MetricsWriter(run.folder, start)) as writer,
        contextlib.closing(profile.Profiler(run.folder, profiled_steps(settings.profile_steps))) as profiler,
        progress(steps, run.name, "steps", initial=start) as bar,
    ):
        for step in range(start + 1, steps + 1):
            with profiler.step(step):
                with jax.profiler.TraceAnnotation("input pipeline"):
                    batch = sharding.global_batch(next(batches))
                watch.lap("input wait")
                state, measured = program.step(state, run.frozen, batch)
            profiler.finish(step, state)
            unchecked.append((step, measured))
            if len(unchecked) > _AHEAD:
                finished, of_finished = unchecked[-1 - _AHEAD]
                jax.block_until_ready(of_finished)
                bar.advance(finished - shown, note)
                shown = finished
            watch.lap("steps" if step > start + 1 else "compile")

            stopping = must_stop(step)
            validates = step % settings.evaluate_every == 0 or step == steps
            saves = validates or stopping or step % settings.checkpoint_every == 0
            if saves or step % _LOG_EVERY == 0:
                _check_finite(run.name, unchecked, checkpoints)
                values = {name: float(value) for name, value in measured.items()}
                watch.lap("steps")
                seconds = watch.spent("compile", "steps", "input wait") - training
                rate = (step - logged) * positions_per_step / seconds
                values |= {
                    "learning_rate": float(learning_rate(step)),
                    "positions_per_second": rate,
                    "flops_per_second": rate * task.flops_per_position,
                    "utilization": rate * task.flops_per_position / peak,
                    "input_wait": (watch.spent("input wait") - waiting) / seconds,
                }
                writer.write(step, values)
                note = f"loss {values['loss']:.3f}"
                bar.advance(step - shown, note)
                shown = logged = step
                training, waiting = training + seconds, watch.spent("input wait")

            if saves and not _all_finite(state):
                raise _diverged(run.name, "the parameters are not finite", step, checkpoints)
            if validates:
                validation = _validated(run, state["parameters"], step, checkpoints)
                writer.write(step, {f"validation/{name}": value for name, value in validation.items()})
                watch.lap("validation")
            if saves:
                checkpoints.save(step, state, step * settings.batch_sequences, validation if validates else None)
                watch.lap("checkpoint")
                writer.write(step, watch.record())
                writer.flush()
            if stopping:
                checkpoints.wait()
                watch.lap("checkpoint")
                writer.write(step, watch.record())
                raise Stopped(f"{run.name}: preempted; wrote a checkpoint at step {step}, run again to resume")
        checkpoints.wait()
        watch.lap("checkpoint")
        writer.write(steps, watch.record())
        stage_costs.restart()
        if must_stop(steps + 1):  # during the last validation or checkpoint; what follows may take hours
            raise Stopped(f"{run.name}: preempted after its last step, {steps}; run again to resume")
    if jax.process_index() == 0:
        say(f"{run.name}: {goodput.table(goodput.summary(writer.records()))}")
    best = checkpoints.best_step()
    if best != steps:
        say(f"{run.name}: the best validation {METRIC} was at step {best} of {steps}; those parameters are kept")
        state = None  # frees device memory for the best parameters
        state, _ = checkpoints.restore(best, program.abstract_state)
    summary = {"step": best, "steps": steps, "validation": checkpoints.validation(best)}
    checkpoints.close()
    return state["parameters"], summary


@jax.jit
def _all_finite(tree) -> jax.Array:
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _check_finite(name: str, unchecked: list[tuple[int, dict[str, jax.Array]]], checkpoints: Checkpoints) -> None:
    """Checks and empties the list of (step, statistics).

    Raises:
      UserError: the loss of a step or its gradient is not finite; names the first such step.
    """
    for step, measured in unchecked:
        for statistic, words in (("loss", "loss"), ("gradient_norm", "gradient norm")):
            value = float(measured[statistic])
            if not math.isfinite(value):
                raise _diverged(name, f"the {words} is {value}", step, checkpoints)
    unchecked.clear()


def _validated(run: Run, parameters, step: int, checkpoints: Checkpoints) -> dict[str, float]:
    """The run's metrics on the validation split.

    Raises:
      UserError: they are not finite.
    """
    try:
        return run.validate(parameters)
    except NotANumber as error:
        raise _diverged(run.name, f"the validation failed ({error})", step, checkpoints) from error


def _diverged(name: str, what: str, step: int, checkpoints: Checkpoints) -> UserError:
    """The error for a diverged training; earlier checkpoints are good."""
    checkpoints.wait()
    return UserError(
        f"{name}: {what} at step {step}; the last good checkpoint is at step {checkpoints.latest_step() or 0}. Lower "
        "learning_rate or clip_norm, and run again in another workdir"
    )
