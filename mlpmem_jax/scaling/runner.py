"""Runs the tasks of a sweep on this machine, several at once, and shows their progress."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

from mlpmem_jax.core import child_process, lock, storage
from mlpmem_jax.core.errors import Stopped, UserError
from mlpmem_jax.core.progress import live, say
from mlpmem_jax.scaling import collection, table
from mlpmem_jax.scaling.sweep import Sweep
from mlpmem_jax.scaling.tasks import SweepTask, of_sweep

PROGRAM = (sys.executable, "-m", "mlpmem_jax.cli")
"""The command with which a child process runs a verb."""

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 120.0  # from SIGTERM to SIGKILL: time for a checkpoint


@dataclasses.dataclass
class State:
    """The state of a task.

    Attributes:
      phase: "waits", "runs", "finished", "failed", or "skipped" (a task that it needs has failed).
      seconds: time since its start, or its total time.
      reason: why it failed.
    """

    phase: str = "waits"
    seconds: float = 0.0
    reason: str = ""


@dataclasses.dataclass
class _Child:
    task: SweepTask
    process: subprocess.Popen
    log: pathlib.Path
    slot: int
    start: float


def run(sweep: Sweep, workers: int) -> None:
    """Runs every unfinished task, `workers` at once, and writes points.csv.

    A failed task stops only the tasks that need it. On a rerun, finished tasks are skipped and unfinished ones resume
    from their last shard or checkpoint.

    Args:
      sweep: a checked sweep.
      workers: number of concurrent child processes; each gets an equal share of the CPU cores.

    Raises:
      UserError: `workers` is out of range, the workdir is not on this machine, or points failed (the message names
        them).
      Stopped: SIGTERM or SIGINT arrived; the children were told to write checkpoints.
    """
    tasks = of_sweep(sweep)
    states = {task.name: State("finished" if task.is_finished() else "waits") for task in tasks}
    rows = table.Rows(sweep, tasks, states)
    say(f"{sweep.name}: {len(sweep.points)} points, {len(tasks)} tasks, {rows.finished} of them already finished")
    stopped = rows.finished < len(tasks) and _run_tasks(sweep, tasks, states, rows, workers)
    finished = {point.name for point in sweep.points if states[point.name].phase == "finished"}
    if finished:
        say(f"{len(finished)} of {len(sweep.points)} points: {collection.write(sweep, finished)}")
    if stopped:
        raise Stopped(f"{sweep.name}: preempted; finished work is kept, run the same command again to resume")
    if failed := [task for task in tasks if states[task.name].phase == "failed"]:
        reasons = "\n  ".join(f"{task.name}: {states[task.name].reason}" for task in failed)
        missing = [point.name for point in sweep.points if point.name not in finished]
        raise UserError(f"these tasks failed:\n  {reasons}\npoints without a result: {', '.join(missing)}")


def _run_tasks(sweep: Sweep, tasks: list[SweepTask], states: dict[str, State], rows: table.Rows, workers: int) -> bool:
    """Runs the remaining tasks and updates `states`; returns whether it was preempted."""
    cores = _cores()
    if not 1 <= workers <= len(cores):
        raise UserError(f"--workers={workers}: expected 1 to {len(cores)}, the cores of this machine")
    if storage.is_remote(sweep.workdir):
        raise UserError(
            f"config.workdir: {sweep.workdir!r} is not a folder on this machine; set it to a local folder, or "
            "write jobs for other machines with --launch"
        )
    logs = pathlib.Path(sweep.workdir) / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    children: list[_Child] = []
    with _alone(logs) as lock_file, _stop_requests() as must_stop, live(rows.render) as is_live:
        try:
            while not must_stop():
                for child in [child for child in children if child.process.poll() is not None]:
                    children.remove(child)
                    _note_end(child, states)
                    if not is_live:
                        say(rows.line(child.task))
                free = sorted(set(range(workers)) - {child.slot for child in children})
                ready = _ready(tasks, states)
                if not children and not ready:
                    return False
                for slot, task in zip(free, ready, strict=False):
                    children.append(_started(task, slot, cores[slot::workers], logs, lock_file))
                    states[task.name].phase = "runs"
                    if not is_live:
                        say(rows.line(task))
                for child in children:
                    states[child.task.name].seconds = time.monotonic() - child.start
                time.sleep(_POLL_SECONDS)
            return True
        finally:
            _stop(children)


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[int]:
    """Refuses a second sweep in the same workdir; yields the file descriptor of the lock.

    Children inherit it, and the kernel releases the lock when the last holder exits, however it ends. So a new sweep
    waits for children of a killed sweep that are still writing checkpoints.
    """
    end = time.monotonic() + _GRACE_SECONDS
    with (folder / "lock").open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    raise lock.no_locks(folder.parent, error.strerror) from error
                if time.monotonic() > end:
                    raise UserError(
                        f"{folder.parent}: another mlpmem sweep is running in this workdir; wait for it or stop it"
                    ) from error
                time.sleep(_POLL_SECONDS)
        yield file.fileno()


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


@contextlib.contextmanager
def _stop_requests() -> Iterator:
    """Yields a function that returns whether SIGTERM or SIGINT has arrived."""
    is_requested = False

    def note(signum, frame):
        nonlocal is_requested
        is_requested = True

    before = {signum: signal.signal(signum, note) for signum in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: is_requested
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _ready(tasks: list[SweepTask], states: dict[str, State]) -> list[SweepTask]:
    """Tasks that can start, longest remaining chain first; marks as skipped those that never can."""
    for task in tasks:
        if states[task.name].phase == "waits" and any(
            states[needed].phase in ("failed", "skipped") for needed in task.needs
        ):
            states[task.name].phase = "skipped"
    ready = [
        task
        for task in tasks
        if states[task.name].phase == "waits" and all(states[needed].phase == "finished" for needed in task.needs)
    ]
    return sorted(ready, key=lambda task: -task.path_flops)


def _started(task: SweepTask, slot: int, cores: list[int], logs: pathlib.Path, lock: int) -> _Child:
    """Starts a task's child process on its cores, with its own log file."""
    task.prepare()
    log = logs / f"{task.name}.txt"
    command = [*PROGRAM, task.verb, f"--config={task.config.workdir}/config.py"]
    environment = os.environ | {"MLPMEM_QUIET": "0"} | child_process.environment()
    with _on_cores(cores), log.open("a") as output:
        # The child gets its own session, so Ctrl-C reaches only the sweep, which tells its children to checkpoint.
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=(lock,),
        )
    return _Child(task, process, log, slot, time.monotonic())


@contextlib.contextmanager
def _on_cores(cores: list[int]) -> Iterator[None]:
    """Pins children started within to these cores, so that their threads do not compete."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _note_end(child: _Child, states: dict[str, State]) -> None:
    state = states[child.task.name]
    state.seconds = time.monotonic() - child.start
    code = child.process.returncode
    if code == 0 and child.task.is_finished():
        state.phase = "finished"
        return
    lines = [line for line in child.log.read_text(errors="replace").splitlines() if line.strip()]
    how = f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
    state.phase, state.reason = "failed", f"{how}: {lines[-1] if lines else 'no output'} ({child.log})"


def _stop(children: list[_Child]) -> None:
    """Sends SIGTERM to running children, and SIGKILL to those still running after the grace period."""
    for child in children:
        if child.process.poll() is None:
            child.process.terminate()
    end = time.monotonic() + _GRACE_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait()
