"""A job of one or more processes: joining it, and what each process says when the job fails."""

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
    """The work of this process in a job of one or more, for a run in `workdir`; where it `writes`, no other job may.

    In a job of several, a process that fails says why and ends at once: it does not wait for the others, who may wait
    for it. One that loses another ends with the exit code of `Stopped`; it notices at once where connections are closed
    (a killed process), else by missing heartbeats. When one of them is preempted, by SIGTERM, all end with that
    exit code, a second or two later.
    """
    _cache_compiled_programs(workdir)
    join_job()
    if not jax.distributed.is_initialized():
        _open_devices()
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
    """What JAX says of another process that cannot be reached, where that led to an error; else None.

    JAX raises one type, JaxRuntimeError, for all that its C++ code reports, and the status is in its text alone (as of
    JAX 0.10.2), so words have to tell a closed connection from a program that fails. Other libraries raise other types:
    a bucket that is UNAVAILABLE is no lost process.
    """
    for cause in failures.chain(error):
        if isinstance(cause, jax.errors.JaxRuntimeError) and any(sign in str(cause) for sign in _SIGNS_OF_LOSS):
            return str(cause).splitlines()[0][:200]
    return None


def join_job() -> None:
    """Joins the other processes of the job, where the environment says that there are any.

    On a TPU slice, under SLURM and under Kubernetes JAX finds them by itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID tell. MLPMEM_DISTRIBUTED=1 asks for the former. MLPMEM_JOIN_SECONDS says how
    long processes wait for the last to start, MLPMEM_LOST_SECONDS after how long a silent one counts as lost.

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
    if address is not None:
        _bypass_proxy(address.rpartition(":")[0])
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
        except ValueError as error:  # no cluster that JAX knows
            raise UserError(
                f"this process cannot join a job of several: {error}; unset MLPMEM_DISTRIBUTED and "
                "JAX_COORDINATOR_ADDRESS to work alone, or set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
                "JAX_PROCESS_ID"
            ) from error


def _bypass_proxy(host: str) -> None:
    """Has gRPC talk to a host directly where the environment names a proxy for http, which would not know the job.

    So JAX need not warn of such variables, this one among them.
    """
    name = "no_grpc_proxy"
    hosts = os.environ.get(name) or os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ[name] = ",".join([*filter(None, hosts.split(",")), host])
    jax.config.update("jax_check_proxy_envs", False)


def _open_devices() -> None:
    """Makes JAX look for its devices.

    Raises:
      UserError: JAX_PLATFORMS names an accelerator that is not here.
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
    """No other job works in the directory: its first process speaks for all of them."""
    is_first = not jax.distributed.is_initialized() or jax.process_index() == 0
    return lock.held(workdir) if writes and is_first else contextlib.nullcontext()


def _cache_compiled_programs(workdir: str) -> None:
    """Keeps compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or else in WORKDIR/compiled.

    The first process writes them, all read them. Those that compile in less than a second are not kept. Nothing is lost
    where they cannot be written.
    """
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / _COMPILED_FOLDER))
