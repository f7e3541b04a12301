"""Processors and memory that this process may use, and the memory it has used."""

from __future__ import annotations

import contextlib
import ctypes
import os
import pathlib
import resource

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -2, -4, -8  # from glibc's malloc.h


def cpu_count() -> int:
    """Number of processors that this process may run on: those of its job or container, not all of the host's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Bytes of memory that this process may use: the machine's, or less if a container or job is limited."""
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
        # A container may see the host's path although its own group is mounted as the root.
        for folder in (group, *group.parents):
            if (folder / name).is_file():
                limit = (folder / name).read_text().strip()
                limits += [int(limit)] if limit.isdigit() else []  # "max" is no limit
            if folder == mount:
                break
    return limits


def reset_peak() -> None:
    """Resets `peak_rss_bytes` (on Linux)."""
    # Writing 5 resets the kernel's high-water mark; if that is not available, the peak covers the whole process.
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def peak_rss_bytes() -> int:
    """Peak resident memory of this process since the stage began (on Linux) or else since it started."""
    try:
        with open("/proc/self/status") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["VmHWM"].split()[0]) * 1024
    except (OSError, KeyError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def process_age() -> float:
    """Seconds since this process started (on Linux), else 0."""
    try:
        with open("/proc/self/stat") as stat, open("/proc/uptime") as uptime:
            started = int(stat.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
            return float(uptime.read().split()[0]) - started
    except OSError:
        return 0.0


def keep_freed_memory() -> None:
    """Tells glibc to keep freed blocks instead of returning them to the kernel.

    XLA's CPU runtime reallocates its large temporaries in every step; faulting their pages in again took a third of a
    step's time (11,000 page faults per step at width 64, 300 with this). All threads share one arena, because
    per-thread arenas cannot hold blocks above 64 MiB and return larger ones to the kernel. Other C libraries have no
    such call.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        kept = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 2**26, _M_ARENA_MAX: 1}
        for parameter, value in kept.items():
            libc.mallopt(parameter, value)
