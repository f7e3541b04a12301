"""What this process may use of the machine."""

import os

import pytest

from mlpmem_jax.core import host


def write(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, []),
        ({"proc/self/cgroup": "0::/\n"}, []),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "max\n"}, []),
        ({"proc/self/cgroup": "0::/job/step\n", "sys/fs/cgroup/job/memory.max": "8000000\n"}, [8_000_000]),
        # A container sees the host's path, but its own group as the top.
        ({"proc/self/cgroup": "0::/docker/abc\n", "sys/fs/cgroup/memory.max": "5000\n"}, [5000]),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/x\n4:memory:/slurm/job\n0::/\n",
                "sys/fs/cgroup/memory/slurm/job/memory.limit_in_bytes": "7000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
            },
            [7000, 9223372036854771712],
        ),
    ],
)
def test_limits_of_control_groups(tmp_path, files, limits):
    write(tmp_path, files)
    assert host.control_group_limits(tmp_path) == limits


def test_memory_is_the_smaller_of_machine_and_container(monkeypatch):
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    monkeypatch.setattr(host, "control_group_limits", lambda root: [machine // 2, 2 * machine])
    assert host.memory_bytes() == machine // 2
    monkeypatch.setattr(host, "control_group_limits", lambda root: [])
    assert host.memory_bytes() == machine


def test_processors_are_those_that_this_process_may_run_on():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert host.cpu_count() == 1
    finally:
        os.sched_setaffinity(0, before)
