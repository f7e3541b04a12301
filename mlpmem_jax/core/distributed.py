"""A job of one or more processes: joining it, and each process's message when the job fails."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Iterator

import jax
from etils import epath

from mlpmem_jax.core import failures, lock, native_output, preemption, process_exit
from mlpmem_jax.core.errors import Stopped, UserError

_LOST = f"another process of the job was lost. {preemption.WORK_IS_KEPT}"
_SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Barrier failed")
_COMPILED_FOLDER = "compiled"


@contextlib.contextmanager
def job(workdir: str, writes: bool = True) -> Iterator[None]:
    """Context of this process's work in a job, for a run in `workdir`; if it `writes`, no other job may write there.

    Raises UserError if this process works alone with accelerators that it shares with other hosts.

    In a multi-process job, a failing process prints the reason and exits immediately, because the others may be waiting
    for it. A process that loses another one exits with the code of `Stopped`; it detects a closed connection (a killed
    process) immediately, and otherwise missing heartbeats. If one process is preempted by SIGTERM, all exit with that
    code, a second or two later.
    """
    _cache_compiled_programs(workdir)
    join_job()
    if not jax.distributed.is_initialized():
        _open_devices()
        _check_alone()
        with _alone(workdir, writes):
            yield
        return
    with process_exit.explained_abort(_LOST), preemption.watched():
        try:
            _open_devices()
            with _alone(workdir, writes):
                yield
        except UserError as error:
            process_exit.end(str(error), error.exit_code)
        except Exception as error:
            if (sign := sign_of_loss(error)) is not None:
                process_exit.end(f"{_LOST} ({sign})", Stopped.exit_code)
            if (text := failures.outside_cause(error)) is not None:
                process_exit.end(text, UserError.exit_code)
            traceback.print_exc()
            process_exit.end(failures.bug(), failures.BUG)


def sign_of_loss(error: BaseException) -> str | None:
    """JAX's message that another process cannot be reached, if that caused the error; else None.

    JAX raises one type, JaxRuntimeError, for all errors of its C++ code, and the status is only in its text (as of JAX
    0.10.2), so the text must distinguish a closed connection from a failing program. Other libraries raise other types:
    an UNAVAILABLE bucket is not a lost process.
    """
    for cause in failures.chain(error):
        if isinstance(cause, jax.errors.JaxRuntimeError) and any(sign in str(cause) for sign in _SIGNS_OF_LOSS):
            return str(cause).splitlines()[0][:200]
    return None


def join_job() -> None:
    """Joins the other processes of the job, if the environment defines any.

    With MLPMEM_DISTRIBUTED=1, on a TPU slice, SLURM or Kubernetes, JAX finds them by itself; elsewhere set
    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. MLPMEM_JOIN_SECONDS is how long processes wait for
    the last to start, MLPMEM_LOST_SECONDS after how long a silent process counts as lost.

    Raises:
      UserError: the environment does not describe a job.
    """
    seconds, lost_seconds = _whole_number("MLPMEM_JOIN_SECONDS", 600), _whole_number("MLPMEM_LOST_SECONDS", 60)
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and os.environ.get("MLPMEM_DISTRIBUTED", "0") == "0":
        return
    known = {}
    if address is not None and "JAX_NUM_PROCESSES" in os.environ:
        known = {
            "num_processes": _whole_number("JAX_NUM_PROCESSES"),
            "process_id": _whole_number("JAX_PROCESS_ID"),
        }
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        native_output.silence_standard_output()
    _bypass_proxy()
    with process_exit.explained_abort(
        f"the processes of the job did not all find each other within {seconds} s (MLPMEM_JOIN_SECONDS), at "
        f"{address or 'the address that the cluster gives'}: is process 0 running, and can the others reach it there?"
    ):
        try:
            jax.distributed.initialize(
                coordinator_address=address,
                **known,
                initialization_timeout=seconds,
                heartbeat_timeout_seconds=lost_seconds,
            )
        except ValueError as error:  # not a cluster that JAX knows
            raise UserError(
                f"this process cannot join a job of several: {error}; unset MLPMEM_DISTRIBUTED and "
                "JAX_COORDINATOR_ADDRESS to work alone, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID"
            ) from error


def _bypass_proxy() -> None:
    """Makes gRPC connect to the job directly if the environment names an HTTP proxy, which cannot reach it.

    gRPC reads the first of grpc_proxy, https_proxy and http_proxy that is set, and an empty one means none; other
    libraries, which may need the proxy for data, do not read grpc_proxy. JAX's warning is then unnecessary.
    """
    os.environ["grpc_proxy"] = ""  # noqa: SIM112  its name in gRPC
    jax.config.update("jax_check_proxy_envs", False)


def _open_devices() -> None:
    """Initializes JAX's devices.

    Raises:
      UserError: JAX_PLATFORMS names an accelerator that is not present.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        if not (wanted := os.environ.get("JAX_PLATFORMS")):
            raise
        reason = str(error).splitlines()[0] if str(error) else "no device of that kind"
        raise UserError(
            f"the environment variable JAX_PLATFORMS={wanted}: JAX finds no such accelerator here ({reason}); unset "
            "it, or install what it names, e.g. jax[cuda13] or jax[tpu]"
        ) from error


def _check_alone() -> None:
    """Checks that this process, which has joined no job, has no devices on other hosts.

    A TPU slice of several hosts is opened by all of them together, whether or not their processes have joined a job.

    Raises:
      UserError: it has.
    """
    if (hosts := jax.process_count()) > 1:
        raise UserError(
            f"the devices are those of {hosts} hosts, whose processes have not joined a job: use launch.jobset or "
            "launch.tpu_vm (docs/launch.md), or set the environment variable MLPMEM_DISTRIBUTED=1 on every host"
        )


def _whole_number(name: str, default: int | None = None) -> int:
    """The number in an environment variable.

    Raises:
      UserError: it is not a whole number.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name}: expected a whole number, found {text!r}")
    return int(text)


def _alone(workdir: str, writes: bool) -> contextlib.AbstractContextManager:
    """Ensures that no other job works in the directory; the first process holds the lock for all."""
    is_first = not jax.distributed.is_initialized() or jax.process_index() == 0
    return lock.held(workdir) if writes and is_first else contextlib.nullcontext()


def _cache_compiled_programs(workdir: str) -> None:
    """Caches compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or else in WORKDIR/compiled.

    The first process writes them, all read them. Programs that compile in less than a second are not cached. Failing to
    write them is harmless.
    """
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / _COMPILED_FOLDER))
