"""Real processes: their exit codes, their output, and a job that jax.distributed joins over gloo."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from launch import local

ROOT = pathlib.Path(__file__).parents[1]
JOINED = """
from mlpmem_jax.core import distributed
distributed.join_job()
import jax, numpy
from jax.experimental import multihost_utils
print("devices", jax.local_device_count(), jax.device_count())
print("sum", multihost_utils.process_allgather(numpy.ones(1) * (1 + jax.process_index())).sum())
"""


def python(script: str) -> list[str]:
    return [
        sys.executable,
        "-S",
        "-c",
        "import os, sys, time, signal\nme = int(os.environ['JAX_PROCESS_ID'])\n" + script,
    ]


def by_address() -> list[dict[str, str]]:
    return local.environments(2, 3, local.free_port())


def by_slurm() -> list[dict[str, str]]:
    """What launch.slurm and srun set, for two processes on one node of CPUs."""
    shared = {
        "MLPMEM_DISTRIBUTED": "1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=3",
        "JAX_COORDINATOR_PORT": str(local.free_port()),
        "SLURM_JOB_ID": "17",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
    }
    return [shared | {"SLURM_PROCID": str(index), "SLURM_LOCALID": str(index)} for index in range(2)]


@pytest.mark.parametrize("environments", [by_address, by_slurm])
def test_processes_join_one_job_with_their_virtual_devices(capfd, monkeypatch, environments):
    for name in ("grpc_proxy", "http_proxy", "https_proxy"):  # nothing listens there
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("MLPMEM_JOIN_SECONDS", "30")
    assert local.run_processes([sys.executable, "-c", JOINED], environments()) == 0
    lines = capfd.readouterr().out.splitlines()
    for index in (0, 1):
        assert f"[{index}] devices 3 6" in lines
        assert f"[{index}] sum 3.0" in lines
    assert len(lines) == 4, "lines of Gloo, or JAX's warning of proxies, are in the output"


def test_lines_carry_the_number_of_their_process(capfd):
    script = "print('out', me, flush=True); print('error', me, file=sys.stderr); "
    script += "sys.stdout.buffer.write(b'\\xff no newline')"
    assert local.run_processes(python(script), local.environments(3, 1, 1)) == 0
    lines = capfd.readouterr().out.splitlines()
    for index in range(3):
        assert f"[{index}] out {index}" in lines
        assert f"[{index}] error {index}" in lines
        assert f"[{index}] \N{REPLACEMENT CHARACTER} no newline" in lines


@pytest.mark.parametrize(
    ("death", "code", "said"),
    [
        ("sys.exit(7)", 7, "process 1 exited with 7"),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "process 1 was killed by SIGKILL"),
    ],
)
def test_when_one_dies_the_others_are_stopped(capfd, tmp_path, death, code, said):
    # Process 2 does not heed SIGTERM, as one that hangs in a collective.
    script = (
        "if me == 2: signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "open(f'{here}/started{me}', 'w').close()\n"
        "while not all(os.path.exists(f'{here}/started{other}') for other in range(3)): time.sleep(0.01)\n"
        f"if me == 1: {death}\n"
        "time.sleep(600); print('outlived the others')"
    )
    command = python(f"here = {str(tmp_path)!r}\n{script}")
    assert local.run_processes(command, local.environments(3, 1, 1), grace_seconds=0.5) == code
    output = capfd.readouterr()
    assert said in output.err
    assert "outlived" not in output.out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_requests_to_stop_are_passed_on_so_that_a_checkpoint_can_be_written(tmp_path, signum):
    written = "signal.signal(signal.SIGTERM, lambda *_: (open(f'checkpoint{me}', 'w').close(), sys.exit(9)))"
    child = python(f"{written}; open(f'started{{me}}', 'w').close(); time.sleep(600)")
    script = (
        f"import sys; from launch import local\nsys.exit(local.run_processes({child!r}, local.environments(2, 1, 1)))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    while not all((tmp_path / f"started{index}").exists() for index in (0, 1)):
        assert launcher.poll() is None
        time.sleep(0.05)
    launcher.send_signal(signum)
    assert launcher.wait() == 9
    assert all((tmp_path / f"checkpoint{index}").exists() for index in (0, 1))


def test_dry_run_prints_the_commands(capsys):
    arguments = [f"--config={ROOT}/configs/smoke.py", "--processes=2", "--devices=4", "--stage=train"]
    with pytest.raises(SystemExit, match="0"):
        local.main([*arguments, "--config.workdir=runs/two", "--dry_run"])
    first, second = capsys.readouterr().out.splitlines()
    assert "JAX_PROCESS_ID=0" in first
    assert "JAX_PROCESS_ID=1" in second
    for line in (first, second):
        assert "JAX_NUM_PROCESSES=2" in line
        assert "--xla_force_host_platform_device_count=4" in line
        assert line.endswith(f"mlpmem_jax.cli train --config={ROOT}/configs/smoke.py --config.workdir=runs/two &")


def test_a_config_that_does_not_fit_starts_nothing(capsys):
    with pytest.raises(SystemExit, match="2"):
        local.main([f"--config={ROOT}/configs/smoke.py", "--processes=3", "--devices=1"])
    assert "config.datastore.batch_sequences: expected a multiple of 3" in capsys.readouterr().err


def test_a_job_whose_output_nobody_reads_ends():
    """A process whose lines are not read would wait at one of them forever."""
    child = [sys.executable, "-S", "-c", "while True: print('x' * 1000)"]
    script = (
        "from launch import job, local\n"
        f"job.run(job.parser('a', '', ''), lambda *_: local.run_processes({child}, [{{}}, {{}}]), ['--config=c'])"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as launcher:
        launcher.stdout.readline()
        launcher.stdout.close()
        try:
            assert launcher.wait(timeout=20) == 128 + signal.SIGTERM
        finally:
            launcher.terminate()
        said = launcher.stderr.read().splitlines()
    assert len(said) == 1
    assert said[0].endswith("was killed by SIGTERM; the others are stopped")
