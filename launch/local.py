"""Runs N processes with M virtual CPU devices each on this machine, to try a multi-host job locally."""

from __future__ import annotations

import argparse
import os
import queue
import shlex
import signal
import socket
import subprocess
import sys
import threading

from mlpmem_jax.core import failures
from mlpmem_jax.core.errors import UserError

from . import job

_EXAMPLE = "python -m launch.local --processes=2 --devices=4 --config=configs/smoke.py --config.workdir=runs/two"
_GRACE_SECONDS = 10.0  # from SIGTERM to SIGKILL, once one process has died


def environments(processes: int, devices: int, port: int) -> list[dict[str, str]]:
    """The environment variables that each process needs to join the job (`core.distributed.join_job`)."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return [
        {
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": flags.strip(),
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": str(processes),
            "JAX_PROCESS_ID": str(index),
        }
        for index in range(processes)
    ]


def free_port() -> int:
    """A free port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _copy_lines(index: int, process: subprocess.Popen, lock: threading.Lock) -> None:
    for line in process.stdout:  # to its end, because a process whose output is not read would stop at some line
        with lock:
            try:
                print(f"[{index}] {line.rstrip()}", flush=True)
            except BrokenPipeError:  # the reader of the job's output has closed it, which ends the job
                failures.discard_output()
                process.terminate()


def _stop(processes: list[subprocess.Popen], grace_seconds: float) -> None:
    """Sends SIGTERM to running processes, and SIGKILL to those still running after the grace period."""
    running = [process for process in processes if process.poll() is None]
    for process in running:
        process.terminate()
    killer = threading.Timer(grace_seconds, lambda: [process.kill() for process in running if process.poll() is None])
    killer.start()
    for process in running:
        process.wait()
    killer.cancel()


def run_processes(command: list[str], environments: list[dict[str, str]], grace_seconds: float = _GRACE_SECONDS) -> int:
    """Runs the command once per environment, prefixing each line of output with the process's number.

    If one process fails, the others are stopped. SIGTERM is forwarded to all, and the first Ctrl-C as SIGTERM.

    Returns:
      0 if all succeeded, else the exit code of the first that failed (128 + signal if it was killed).
    """
    processes = [
        subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for environment in environments
    ]
    ended: queue.SimpleQueue[int] = queue.SimpleQueue()
    lock = threading.Lock()

    def watch(index: int) -> None:
        processes[index].wait()
        ended.put(index)

    def pass_on(signum, frame) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends immediately
        for process in processes:
            process.send_signal(signal.SIGTERM)

    before = {signum: signal.signal(signum, pass_on) for signum in (signal.SIGTERM, signal.SIGINT)}
    copiers = [
        threading.Thread(target=_copy_lines, args=(index, process, lock), daemon=True)
        for index, process in enumerate(processes)
    ]
    watchers = [threading.Thread(target=watch, args=(index,), daemon=True) for index in range(len(processes))]
    for thread in copiers + watchers:
        thread.start()
    code = 0
    try:
        for _ in processes:
            index = ended.get()
            returned = processes[index].returncode
            if returned != 0:
                code = returned if returned > 0 else 128 - returned
                how = f"exited with {returned}" if returned > 0 else f"was killed by {signal.Signals(-returned).name}"
                print(f"launch.local: process {index} {how}; the others are stopped", file=sys.stderr)
                break
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    finally:
        _stop(processes, grace_seconds)
        for signum, handler in before.items():
            signal.signal(signum, handler)
        for thread in copiers:
            thread.join(timeout=1)
    return code


def _launch(options: argparse.Namespace, overrides: list[str]) -> int:
    for option in ("processes", "devices"):
        if getattr(options, option) < 1:
            raise UserError(f"--{option}={getattr(options, option)}: expected 1 or more")
    job.read_config(
        options.config,
        overrides,
        stage=options.stage,
        devices=options.processes * options.devices,
        processes=options.processes,
    )
    command = [sys.executable, "-m", "mlpmem_jax.cli", options.stage, f"--config={options.config}", *overrides]
    joined = environments(options.processes, options.devices, free_port())
    if options.dry_run:
        for environment in joined:
            settings = [f"{name}={value}" for name, value in environment.items()]
            print(shlex.join(["env", *settings, *command]), "&")
        return 0
    return run_processes(command, joined)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `python -m launch.local`."""
    parser = job.parser("local", __doc__, _EXAMPLE)
    parser.add_argument("--processes", type=int, required=True, help="number of processes, each standing for a host")
    parser.add_argument("--devices", type=int, default=1, help="virtual CPU devices per process (default 1)")
    job.run(parser, _launch, arguments)


if __name__ == "__main__":
    main()
