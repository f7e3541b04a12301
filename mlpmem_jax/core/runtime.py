"""The process: joining a job of several, and what a stage cost in time and memory."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
import time
from collections.abc import Iterator

import jax
from etils import epath

STAGES_FILE = "stages.jsonl"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


def join_job() -> None:
    """Joins the other processes of the job, where the environment says that there are any.

    On a TPU slice, under SLURM and under Kubernetes JAX finds them by itself; elsewhere JAX_COORDINATOR_ADDRESS,
    JAX_NUM_PROCESSES and JAX_PROCESS_ID tell. MLPMEM_DISTRIBUTED=1 asks for the former.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if address is None and os.environ.get("MLPMEM_DISTRIBUTED", "0") == "0":
        return
    known = {}
    if address is not None and "JAX_NUM_PROCESSES" in os.environ:
        known = {
            "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
            "process_id": int(os.environ["JAX_PROCESS_ID"]),
        }
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator_address=address, **known)


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of returning them to the kernel.

    XLA's CPU runtime allocates its large temporaries anew in every step; faulting their pages in again took a third of
    a step's time (11,000 page faults a step at width 64, 300 with this). Other C libraries have no such call.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        for parameter, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26)):
            libc.mallopt(parameter, value)


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


def _reset_peak() -> None:
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


def memory_bytes() -> int:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


@contextlib.contextmanager
def measured_stage(workdir: str, stage: str) -> Iterator[None]:
    """Records seconds and peak memory of a stage in WORKDIR/stages.jsonl, also of one that fails."""
    _reset_peak()
    start = time.perf_counter()
    try:
        yield
    finally:
        if jax.process_index() == 0:
            record = {"stage": stage, "seconds": time.perf_counter() - start, "peak_rss_bytes": peak_rss_bytes()}
            file = epath.Path(workdir) / STAGES_FILE
            file.parent.mkdir(parents=True, exist_ok=True)
            before = file.read_text() if file.exists() else ""
            file.write_text(before + json.dumps(record) + "\n")
