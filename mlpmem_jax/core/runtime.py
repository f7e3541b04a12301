"""The process: joining a job of several, and what a stage cost in time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import pathlib
import resource
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import jax
from etils import epath

from mlpmem_jax.core import failures, lock
from mlpmem_jax.core.errors import Stopped, UserError

_KEPT = "What was complete is kept: run the same command again, with as many processes as you like"
_LOST = f"another process of the job was lost. {_KEPT}"
_ASKED = f"the job was preempted. {_KEPT}"
_LINGER_SECONDS = 2.0  # of process 0, which coordinates: when it ends, JAX ends the rest before they can say why
_SIGNS_OF_LOSS = ("Gloo", "UNAVAILABLE", "DEADLINE_EXCEEDED", "heartbeat", "Barrier failed")

_NOTICE = "RECEIVED_PREEMPTION_NOTICE"  # JAX's key for what tells all processes that one of them got SIGTERM
_NOTICE_SECONDS = 1.0  # between looks for it
_stops_by_itself = threading.Lock()  # held by work that leaves by itself, at a better moment
_ending = threading.Lock()  # never released: the first reason to end is the one that is said

STAGES_FILE = "stages.jsonl"
_COMPILED_FOLDER = "compiled"
_began: list[float] = []  # Unix times at which the stages of this process began
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # of glibc's malloc.h


def join_job() -> None:
    """Joins the other processes of the job, where the environment says that there are any.

    On a TPU slice, under SLURM and under Kubernetes JAX finds them by itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID tell. MLPMEM_DISTRIBUTED=1 asks for the former. MLPMEM_JOIN_SECONDS says how
    long processes wait for the last to start, MLPMEM_LOST_SECONDS after how long a silent one counts as lost.
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
        _keep_standard_output_for_python()
    if address is not None:
        _bypass_proxy(address.rpartition(":")[0])
    with _explained_abort(
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
    """Has gRPC talk to a host directly where the environment names a proxy for http, which would not know the job."""
    name = "no_grpc_proxy"
    hosts = os.environ.get(name) or os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    os.environ[name] = ",".join([*filter(None, hosts.split(",")), host])


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
      UserError: it is none.
    """
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise UserError(f"the environment variable {name}: expected a whole number, found {text!r}")
    return int(text)


@contextlib.contextmanager
def _explained_abort(text: str) -> Iterator[None]:
    """While inside, `text` is the last line of this process when JAX ends it, and the exit code that of `Stopped`.

    JAX's threads call abort() when a process of the job cannot be reached. Python's own signal handlers would run
    later, which is never; this one runs at once.
    """

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def explain(signum):
        if not _ending.acquire(blocking=False):
            time.sleep(2 * _LINGER_SECONDS)  # another thread has said why this process ends, and ends it meanwhile
        os.write(2, f"mlpmem: error: {text}\n".encode())
        os._exit(Stopped.exit_code)

    libc = ctypes.CDLL(None)
    libc.signal(signal.SIGABRT, explain)
    try:
        yield
    finally:
        libc.signal(signal.SIGABRT, ctypes.c_void_p(signal.SIG_DFL))


@contextlib.contextmanager
def job(workdir: str, writes: bool = True) -> Iterator[None]:
    """The work of this process in a job of one or more, for a run in `workdir`; where it `writes`, no other job may.

    In a job of several, a process that fails says why and ends at once: it does not wait for the others, who may wait
    for it. One that loses another ends with the exit code of `Stopped`; it notices at once where connections are closed
    (a killed process), else by missing heartbeats. When one of them is preempted, by SIGTERM, all end with that
    exit code, a second or two later.
    """
    _keep_compiled(workdir)
    join_job()
    if not jax.distributed.is_initialized():
        _open_devices()
        with _alone(workdir, writes):
            yield
        return
    finished = threading.Event()
    watcher = threading.Thread(target=_end_when_asked, args=(finished,), daemon=True)
    watcher.start()
    with _explained_abort(_LOST):
        try:
            _open_devices()
            with _alone(workdir, writes):
                yield
        except UserError as error:
            _end(str(error), error.exit_code)
        except Exception as error:
            if any(sign in str(error) for sign in _SIGNS_OF_LOSS):
                _end(f"{_LOST} ({str(error).splitlines()[0][:200]})", Stopped.exit_code)
            if (text := failures.outside_cause(error)) is not None:
                _end(text, UserError.exit_code)
            traceback.print_exc()
            _end(failures.bug(), failures.BUG)
        finished.set()
        watcher.join()


def _alone(workdir: str, writes: bool) -> contextlib.AbstractContextManager:
    """No other job works in the directory: its first process speaks for all of them."""
    is_first = not jax.distributed.is_initialized() or jax.process_index() == 0
    return lock.held(workdir) if writes and is_first else contextlib.nullcontext()


def _end(text: str, code: int, lingers: bool = False) -> NoReturn:
    _ending.acquire()
    lock.release_all()
    print(f"mlpmem: error: {text}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    if lingers or jax.process_index() == 0:
        time.sleep(_LINGER_SECONDS)
    os._exit(code)


def _end_when_asked(finished: threading.Event) -> None:
    """Ends this process when the job is preempted, whatever its main thread does or waits for.

    No stage loses more than the shards in work when it ends at any moment, and none needs the others to agree, but for
    what is in `stopping_by_itself`. All processes linger, so that none takes another's end for a loss.
    """
    from jax._src import distributed  # JAX's public call tells of the notice at agreed steps alone

    while not finished.wait(_NOTICE_SECONDS):
        try:
            distributed.global_state.client.key_value_try_get(_NOTICE)
        except jax.errors.JaxRuntimeError:  # there is none
            continue
        with _stops_by_itself:
            _end(_ASKED, Stopped.exit_code, lingers=True)


@contextlib.contextmanager
def stopping_by_itself() -> Iterator[None]:
    """While inside, preemption does not end this process: what is inside takes note, and raises `Stopped`."""
    _stops_by_itself.acquire()
    yield
    _stops_by_itself.release()  # not after an error: this process then ends with that


def _keep_compiled(workdir: str) -> None:
    """Keeps compiled programs for the next start, in JAX_COMPILATION_CACHE_DIR or else in WORKDIR/compiled.

    The first process writes them, all read them. Those that compile in less than a second are not kept.
    """
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / _COMPILED_FOLDER))


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of returning them to the kernel.

    XLA's CPU runtime allocates its large temporaries anew in every step; faulting their pages in again took a third of
    a step's time (11,000 page faults a step at width 64, 300 with this). All threads share one arena: a thread's
    own holds no block above 64 MiB, and larger ones go back to the kernel all the same. Other C libraries have no such
    call.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        kept = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26, _M_ARENA_MAX: 1}
        for parameter, value in kept.items():
            libc.mallopt(parameter, value)


def _keep_standard_output_for_python() -> None:
    """Sends what C++ prints to standard output nowhere: Gloo tells of each connection there, amid lines of Python's."""
    sys.stdout.flush()
    kept = open(os.dup(1), "w", buffering=1, encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 1)
    sys.stdout = kept


@contextlib.contextmanager
def no_native_log() -> Iterator[None]:
    """Keeps what C++ libraries print off standard error; their errors come as exceptions all the same."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as null:
            os.dup2(null.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def reset_peak() -> None:
    """From here on `peak_rss_bytes` counts anew (on Linux)."""
    # Writing 5 resets the kernel's high-water mark; where that is not to be had the peak is that of the whole process.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since the stage began (on Linux), else since it started."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _process_age() -> float:
    """Seconds since this process started (on Linux), else 0."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return float(uptime.read().split()[0]) - started
    except OSError:
        return 0.0


def stage_began() -> float:
    """Unix time at which the stage that runs began: the first stage of a process with the process itself."""
    return _began[-1] if _began else time.time()


def cpu_count() -> int:
    """Processors that this process may run on: those of its job or container, not all that the host has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Memory that this process may use: that of the machine, or less where a container or a job is limited."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([machine, *control_group_limits(pathlib.Path("/"))])


def control_group_limits(root: pathlib.Path) -> list[int]:
    """Memory limits in bytes of this process's control group and of those that contain it, versions 1 and 2.

    Args:
      root: where /proc and /sys are mounted.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    limits = []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers == "":
            mount, name = root / "sys/fs/cgroup", "memory.max"
        elif "memory" in controllers.split(","):
            mount, name = root / "sys/fs/cgroup/memory", "memory.limit_in_bytes"
        else:
            continue
        group = mount / path.strip("/")
        # A container may see the host's path with its own group mounted as the top.
        for folder in (group, *group.parents):
            if (folder / name).is_file():
                limit = (folder / name).read_text().strip()
                limits += [int(limit)] if limit.isdigit() else []  # "max" is no limit
            if folder == mount:
                break
    return limits


@contextlib.contextmanager
def measured_stage(workdir: str, stage: str) -> Iterator[None]:
    """Records seconds and peak memory of a stage in WORKDIR/stages.jsonl, also of one that fails."""
    reset_peak()
    start = time.perf_counter()
    _began.append(time.time() if _began else time.time() - _process_age())
    try:
        yield
    finally:
        if jax.process_index() == 0:
            record = {"stage": stage, "seconds": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes()}
            # What the stage itself has to tell is more than that this record found no room.
            with contextlib.suppress(OSError):
                file = epath.Path(workdir) / STAGES_FILE
                file.parent.mkdir(parents=True, exist_ok=True)
                before = file.read_text() if file.exists() else ""
                file.write_text(before + json.dumps(record) + "\n")
