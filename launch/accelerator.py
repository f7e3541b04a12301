"""Tests and measures a new accelerator in time-limited steps: `make accelerator`.

    tests       compares its numbers with the CPU's (tests/test_accelerator.py, in a checkout)
    benchmark   rates at the paper's sizes, next to the reference's step in PyTorch
    library     configs/library_h100.py: a memory for SmolLM2-135M
    sweep       configs/sweeps/library_sizes.py, and laws fitted to its points

Each step writes its results to the output folder as soon as there are any, even if it runs out of time. When run again,
library and sweep resume. `--smoke` runs everything on the CPU at small sizes.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from mlpmem_jax.core import config_files
from mlpmem_jax.core.installation import READY

ROOT = pathlib.Path(__file__).parents[1]
_GRACE_SECONDS = 20.0  # from SIGTERM to SIGKILL: a training writes a checkpoint
_MLPMEM = (sys.executable, "-m", "mlpmem_jax.cli")

_SMALL_CORPUS = {
    "corpus.source": "installed_docs",
    "corpus.max_bytes": 40_000,
    "tokenizer.source": "train",
    "tokenizer.vocab_size": 300,
    "base.context_length": 32,
    "base.training.steps": 20,
    "base.training.warmup_steps": 2,
    "targets.k": 8,
    "targets.quality_positions": 64,
    "training.batch_sequences": 16,
    "evaluation.sharpness_positions": 50,
}
_SMALL_LIBRARY = _SMALL_CORPUS | {
    "base.source": "train",
    "base.width": 32,
    "memory.width": 32,
    "memory.feed_forward_width": 64,
    "training.epochs": 1,
    "training.warmup_steps": 2,
}
_SMALL_SWEEP = """\
from configs.sweeps import library_sizes


def get_sweep():
    sizes = {"a": (16, 1, 2, 1), "b": (24, 1, 2, 1), "c": (32, 1, 2, 1)}
    return library_sizes.of_sizes(sizes, positions=150)
"""


class Step(NamedTuple):
    """One step.

    Attributes:
      name: its name in the options.
      seconds: maximum time, after which it is stopped.
      commands: commands to run in sequence; the first failure ends the step.
      results: files that it writes -> their names in the output folder.
    """

    name: str
    seconds: float
    commands: tuple[tuple[str, ...], ...]
    results: dict[pathlib.Path, str]


def steps(output: pathlib.Path, workdir: pathlib.Path, smoke: bool) -> list[Step]:
    """All steps in order.

    Args:
      output: folder of the results.
      workdir: folder of the trainings; a smoke run also writes its sweep file there.
      smoke: whether to use small sizes.
    """
    sweep = READY / "configs" / "sweeps" / "library_sizes.py"
    library, points, fit = (workdir / name for name in ("library", "sweep", "fit"))
    if smoke:
        sweep = workdir / "small_sweep.py"
        workdir.mkdir(parents=True, exist_ok=True)
        sweep.write_text(_SMALL_SWEEP)
    workers = f"--workers={2 if smoke else 1}"
    marked = "not accelerator" if smoke else "accelerator"
    pytest = (sys.executable, "-m", "pytest", "-m", marked, str(ROOT / "tests" / "test_accelerator.py"))
    config = f"--config={READY / 'configs' / 'library_h100.py'}"
    return [
        Step("tests", 240, (pytest,), {}),
        Step(
            "benchmark",
            300,
            ((*_MLPMEM, "benchmark", config, "--rows=accelerator", f"--json={output / 'benchmark.json'}"),),
            {},
        ),
        Step(
            "library",
            900,
            ((*_MLPMEM, "run", config, *_overrides(library, _SMALL_LIBRARY if smoke else {})),),
            {library / "report" / "metrics.json": "library.json"},
        ),
        Step(
            "sweep",
            3600,
            (
                (*_MLPMEM, "sweep", f"--config={sweep}", workers, *_overrides(points, _SMALL_CORPUS if smoke else {})),
                (*_MLPMEM, "fit", f"--runs={points}", f"--output={fit}"),
            ),
            {
                points / "points.csv": "points.csv",
                fit / "fit.json": "fit.json",
                fit / "fit.png": "fit.png",
            },
        ),
    ]


def _overrides(workdir: pathlib.Path, values: dict) -> list[str]:
    return [f"--config.{key}={value}" for key, value in {"workdir": workdir, **values}.items()]


def environment(smoke: bool) -> dict[str, str]:
    """Environment variables for the steps: devices, and leaving memory to PyTorch."""
    chosen = {"MLPMEM_TEST_DEVICES": "accelerator"}
    if smoke:  # most of its time is compilation
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0"
        chosen = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {
        **os.environ,
        **chosen,
        "PYTHONPATH": os.pathsep.join(paths),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "PYTHONUNBUFFERED": "1",
    }


def run(steps: Sequence[Step], output: pathlib.Path, environment: dict[str, str], seconds: float) -> list[dict]:
    """Runs the steps; if one fails, the next ones still run.

    Args:
      steps: the steps, in order.
      output: folder of log.txt, summary.json and the results.
      environment: environment of the processes.
      seconds: maximum time for all steps together.

    Returns:
      The contents of summary.json: name, seconds and outcome of each step.
    """
    output.mkdir(parents=True, exist_ok=True)
    end, summary = time.monotonic() + seconds, []
    for step in steps:
        start = time.monotonic()
        stop = min(end, start + step.seconds)
        outcome = "ok"
        for command in step.commands:
            outcome = _outcome(command, output / "log.txt", environment, stop)
            if outcome != "ok":
                break
        for file, name in step.results.items():
            if file.exists():
                shutil.copyfile(file, output / name)
        summary.append({"step": step.name, "seconds": round(time.monotonic() - start, 1), "outcome": outcome})
        (output / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        print(f"{step.name}: {outcome}, {summary[-1]['seconds']} s", flush=True)
    return summary


def _outcome(command: Sequence[str], log: pathlib.Path, environment: dict[str, str], stop: float) -> str:
    """Runs one command until it ends or the monotonic clock reaches `stop`; its output is streamed to the log."""
    if (left := stop - time.monotonic()) <= 0:
        return "no time left"
    with log.open("ab") as file:
        file.write(f"\n$ {' '.join(command)}\n".encode())
        file.flush()
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        try:
            code = process.wait(left)
        except subprocess.TimeoutExpired:
            _end(process)
            return "stopped, out of time"
        except BaseException:
            _end(process)
            raise
    return "ok" if code == 0 else f"exit code {code}"


def _end(process: subprocess.Popen) -> None:
    """Ends a process and its children."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def main(arguments: list[str] | None = None) -> None:
    """Entry point; the exit code is 1 if a step did not succeed."""
    names = [step.name for step in steps(pathlib.Path(), pathlib.Path(), smoke=False)]
    parser = argparse.ArgumentParser(
        prog="python -m launch.accelerator", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smoke", action="store_true", help="everything on the CPU, at small sizes")
    parser.add_argument("--steps", default=",".join(names), metavar="A,B", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--seconds", type=float, default=7200, help="maximum time for all steps together (default 7200)"
    )
    path = config_files.path_option
    parser.add_argument("--output", type=path, metavar="DIR", help="default runs/accelerator, or its _smoke")
    parser.add_argument("--workdir", type=path, metavar="DIR", help="folder of the trainings (default OUTPUT/runs)")
    options = parser.parse_args(arguments)
    chosen = options.steps.split(",")
    if unknown := sorted(set(chosen) - set(names)):
        parser.error(f"--steps: no step {unknown[0]!r}; there are {', '.join(names)}")
    output = pathlib.Path(options.output or f"runs/accelerator{'_smoke' if options.smoke else ''}").absolute()
    workdir = pathlib.Path(options.workdir or output / "runs").absolute()
    selected = [step for step in steps(output, workdir, options.smoke) if step.name in chosen]
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))  # also ends the running step
    summary = run(selected, output, environment(options.smoke), options.seconds)
    sys.exit(any(step["outcome"] != "ok" for step in summary))


if __name__ == "__main__":
    main()
