"""The run on a new accelerator: steps bounded in time, results kept whatever happens, and all of it whole on a CPU."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from launch import accelerator
from launch.accelerator import Step
from mlpmem_jax import cli
from mlpmem_jax.core import config_files
from mlpmem_jax.scaling import sweep


def python(script):
    return sys.executable, "-S", "-c", script


def test_steps_are_bounded_and_leave_their_results(tmp_path):
    result = tmp_path / "made"
    steps = [
        Step("fails", 60, (python("print('one'); raise SystemExit(3)"), python("print('never')")), {}),
        Step("hangs", 1, (python(f"open({str(result)!r}, 'w').write('x'); import time; time.sleep(60)"),),
             {result: "result", tmp_path / "absent": "absent"}),
        Step("works", 60, (python("print('two')"), python("print('three')")), {}),
        Step("late", 60, (python("print('never')"),), {}),
    ]  # fmt: skip
    output, start = tmp_path / "output", time.monotonic()
    summary = accelerator.run(steps[:3], output, dict(os.environ), seconds=60)
    assert time.monotonic() - start < 20
    assert [step["outcome"] for step in summary] == ["exit code 3", "stopped, out of time", "ok"]
    assert json.loads((output / "summary.json").read_text()) == summary
    assert (output / "result").read_text() == "x"
    log = (output / "log.txt").read_text()
    assert all(f"\n{word}\n" in log for word in ("one", "two", "three"))
    assert "\nnever\n" not in log
    assert accelerator.run(steps[3:], output, {}, seconds=0)[0]["outcome"] == "no time left"


def test_what_ignores_the_signal_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "_GRACE_SECONDS", 0.2)
    deaf = python("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)")
    start = time.monotonic()
    (step,) = accelerator.run([Step("deaf", 1, (deaf,), {})], tmp_path, {}, seconds=60)
    assert step["outcome"] == "stopped, out of time"
    assert time.monotonic() - start < 20


def test_a_run_that_is_stopped_stops_its_step(tmp_path, monkeypatch):
    note = tmp_path / "pid"
    script = f"import os, time; open({str(note)!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    monkeypatch.setattr(accelerator, "steps", lambda *_, **__: [Step("tests", 60, (python(script),), {})])
    before = signal.getsignal(signal.SIGTERM)
    threading.Timer(1, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        with pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            accelerator.main([f"--output={tmp_path / 'output'}"])
    finally:
        signal.signal(signal.SIGTERM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@pytest.mark.parametrize("smoke", [True, False])
def test_every_config_of_a_run_is_valid(tmp_path, monkeypatch, smoke):
    """Read as the commands will read them, so that no typo is found on the accelerator."""
    monkeypatch.chdir(tmp_path)
    read = []
    for step in accelerator.steps(tmp_path / "output", tmp_path / "work", smoke):
        for command in step.commands:
            if "mlpmem_jax.cli" in command:  # an option that does not exist would end this process
                cli._parser().parse_known_args(command[command.index("mlpmem_jax.cli") + 1 :])
            words = [word for word in command if word.startswith("--config")]
            if "sweep" in command:
                file, *overrides = words
                points = sweep.read(file.removeprefix("--config="), overrides).points
                assert {point.arm for point in points} == set(sweep.ARMS)
                read.append("sweep")
            elif "mlpmem_jax.cli" in command and "fit" not in command:
                config_files.read(words[0].removeprefix("--config="), words[1:])
                read.append(step.name)
    assert read == ["benchmark", "library", "sweep"]


def test_unknown_steps_are_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        accelerator.main(["--steps=tests,banchmark"])
    assert "no step 'banchmark'; there are tests, benchmark, library, sweep" in capsys.readouterr().err


@pytest.mark.slow
def test_a_smoke_run_is_whole(tmp_path, tmp_path_factory):
    with pytest.raises(SystemExit) as ended:
        accelerator.main(["--smoke", f"--output={tmp_path}", f"--workdir={tmp_path_factory.mktemp('work')}"])
    assert ended.value.code == 0, (tmp_path / "log.txt").read_text()[-4000:]
    assert all(step["outcome"] == "ok" for step in json.loads((tmp_path / "summary.json").read_text()))
    assert not [entry for entry in tmp_path.iterdir() if entry.is_dir()]
    for name in ("benchmark.json", "library.json", "points.csv", "fit.json", "fit.png"):
        assert (tmp_path / name).stat().st_size, name
