"""Jobs of several real processes (gloo between them) against one process; kills, lost coordinators, preemption.

The reference is one process with one device; jobs that were stopped go on in this process, on eight virtual devices.
MLPMEM_KILLS=2 adds jobs of four processes.
"""

import json
import os
import pathlib
import shutil
import sys

import numpy as np
import pytest

from configs import smoke
from launch import local
from mlpmem_jax.cli import STAGES, _run_stage
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.training import goodput

ROOT = pathlib.Path(__file__).parent.parent
KILLS = int(os.environ.get("MLPMEM_KILLS", "1"))
STEPS, EVERY = 12, 4
EXIT_AGAIN = 75

# One process of a job: stages of a config, with something that happens to one of the processes.
DRIVER = """
import os, signal, sys, time
me, (workdir, stages, mesh, event) = int(os.environ["JAX_PROCESS_ID"]), sys.argv[1:]
if event == "late" and me == 1: time.sleep(3)
from test_processes import small
from mlpmem_jax import cli
from mlpmem_jax.core import runtime
from mlpmem_jax.retrieval import tiles
from mlpmem_jax.training import data, state
config = small(workdir)
config.mesh.fsdp, config.mesh.tensor = (int(size) for size in mesh.split("x"))
def after(owner, name, calls, signum):
    method, seen = getattr(owner, name), []
    def wrapper(self, *arguments):
        result = method(self, *arguments)
        seen.append(0)
        if len(seen) == calls: os.kill(os.getpid(), signum)
        return result
    setattr(owner, name, wrapper)
if me == 1:
    if event == "killed_in_save": after(state.Checkpoints, "save", 2, signal.SIGKILL)  # the save goes on in a thread
    if event == "killed_in_step": after(data.TargetSource, "__getitem__", 36, signal.SIGKILL)
    if event == "killed_in_targets": after(tiles.Split, "write", 1, signal.SIGKILL)
    if event == "asked_to_stop": after(data.TargetSource, "__getitem__", 4, signal.SIGTERM)
with runtime.job(workdir):
    for stage in stages.split(","):
        if stage == "generate":
            from types import SimpleNamespace
            from mlpmem_jax.inference import compare
            greedy = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "seed": 0}
            compare.run(config, SimpleNamespace(prompt=["Return"], tokens=5, **greedy))
        else:
            cli._run_stage(stage, config)
"""


def small(workdir):
    config = smoke.get_config()
    config.workdir = str(workdir)
    config.corpus.update({"source": "files", "path": f"{ROOT}/docs", "document_bytes": 2048, "max_bytes": 60_000})
    config.tokenizer.vocab_size = 300
    config.base.update({"context_length": 16, "width": 16, "blocks": 1})
    for settings in (config.base.training, config.training):
        settings.update({"steps": STEPS, "warmup_steps": 2, "evaluate_every": EVERY, "checkpoint_every": EVERY})
        settings.update({"evaluation_sequences": 16, "optimizer": "adamw", "learning_rate": 0.003})
    config.datastore.update({"sequences_per_shard": 512, "batch_sequences": 64})
    config.targets.update({"k": 5, "temperature": 3.0, "quality_positions": 64})
    config.memory.update({"width": 16, "blocks": 1})
    config.evaluation.update({"bootstrap_samples": 50, "sharpness_positions": 50})
    return config


def launch(workdir, stages, processes, mesh, event="nothing", devices=1):
    """Exit code of a job of so many processes; what they print is left to `capfd`."""
    environments = local.environments(processes, devices, local.free_port())
    for environment in environments:
        environment |= {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "MLPMEM_LOST_SECONDS": "6",
            "MLPMEM_QUIET": "0",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        }
    command = [sys.executable, "-c", DRIVER, str(workdir), stages, mesh, event]
    # One process of the job ends by itself: the launcher must not be what ends the others.
    return local.run_processes(command, environments, grace_seconds=60)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "run"
    assert launch(folder, ",".join(STAGES), 1, "1x1") == 0
    return folder


def seeded(reference, tmp_path, *names):
    workdir = tmp_path / "run"
    for name in names:
        shutil.copytree(reference / name, workdir / name)
    return workdir


def losses(workdir, name):
    records = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def files(folder):
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def assert_same_losses(workdir, reference, name):
    expected, found = losses(reference, name), losses(workdir, name)
    assert list(found) == list(expected) == list(range(EVERY, STEPS + 1, EVERY))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-4)


def test_two_processes_that_start_apart_make_what_one_makes(reference, tmp_path):
    """Tokens: the same bytes. Base: losses to 1e-4. Keys: float16 of states that differ by that much."""
    workdir = seeded(reference, tmp_path)
    assert launch(workdir, "tokens,base,datastore", 2, "-1x1", "late") == 0
    assert files(workdir / "tokens") == files(reference / "tokens")
    assert_same_losses(workdir, reference, "base")
    for split in ("train", "validation", "test"):
        ours, theirs = (open_artifact(at / "datastore" / split, "datastore") for at in (workdir, reference))
        assert ours.arrays == theirs.arrays
        sequences = theirs.arrays["keys"].shape[0]
        for name in theirs.arrays:
            found, expected = (artifact.read(name, 0, sequences).astype(np.float64) for artifact in (ours, theirs))
            np.testing.assert_allclose(found, expected, atol=5e-3 if theirs.arrays[name].dtype[0] == "f" else 0)


def test_a_killed_target_builder_ends_the_job_and_one_process_finishes_it(reference, tmp_path, capfd):
    workdir = seeded(reference, tmp_path, "tokens", "datastore")
    assert launch(workdir, "targets", 2, "-1x1", "killed_in_targets") == 128 + 9
    assert "another process of the job was lost. What was complete is kept" in capfd.readouterr().out
    assert len(list((workdir / "targets" / "train" / "shards").iterdir())) >= 1
    _run_stage("targets", small(workdir))
    assert files(workdir / "targets") == files(reference / "targets")


@pytest.mark.parametrize(
    ("event", "processes", "mesh"),
    [("killed_in_save", 2, "1x2")]  # one `tensor` axis over both: they read the same rows
    + [("killed_in_step", 4, "2x2"), ("killed_in_step", 4, "1x4"), ("killed_in_save", 4, "4x1")] * (KILLS - 1),
)
def test_a_killed_training_goes_on_on_another_mesh(reference, tmp_path, capfd, event, processes, mesh):
    workdir = seeded(reference, tmp_path, "tokens", "base", "datastore", "targets")
    assert launch(workdir, "train", processes, mesh, event) == 128 + 9
    output = capfd.readouterr().out
    assert "another process of the job was lost" in output
    assert "Traceback" not in output
    assert losses(workdir, "memory")
    _run_stage("train", small(workdir))  # one process, eight devices
    assert_same_losses(workdir, reference, "memory")


def test_a_notice_to_one_process_leads_to_one_checkpoint_of_all(reference, tmp_path, capfd):
    workdir = seeded(reference, tmp_path, "tokens", "base", "datastore", "targets")
    assert launch(workdir, "train", 2, "-1x1", "asked_to_stop") == EXIT_AGAIN
    output = capfd.readouterr().out
    stopped = {line.split("at step ")[1].split()[0] for line in output.splitlines() if "asked to stop" in line}
    assert len(stopped) == 1  # both say the same step
    assert (workdir / "memory" / "checkpoints" / stopped.pop()).exists()
    _run_stage("train", small(workdir))
    found, expected = losses(workdir, "memory"), losses(reference, "memory")
    np.testing.assert_allclose([found[step] for step in expected], list(expected.values()), rtol=1e-4)
    records = [json.loads(line) for line in (workdir / "memory" / "metrics.jsonl").read_text().splitlines()]
    spent = goodput.summary(records)
    assert spent["restore"] > 0
    assert spent["between runs"] > 0
    assert spent["wall"] == pytest.approx(sum(value for phase, value in spent.items() if phase != "wall"))


def test_two_processes_evaluate_and_generate_as_one(reference, tmp_path, capfd):
    workdir = seeded(reference, tmp_path, "tokens", "base", "datastore", "targets", "memory")
    assert launch(workdir, "evaluate,generate", 2, "-1x1") == 0
    ours, theirs = (json.loads((at / "report" / "metrics.json").read_text()) for at in (workdir, reference))
    for name, value in theirs["perplexity"]["test"].items():
        assert ours["perplexity"]["test"][name] == pytest.approx(value, rel=1e-5)
    assert capfd.readouterr().out.count("base LM + memory") == 1  # the first process alone prints


def test_a_coordinator_that_is_not_there_is_named_in_bounded_time(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("MLPMEM_JOIN_SECONDS", "3")
    absent = local.environments(2, 1, local.free_port())[1:]
    command = [sys.executable, "-m", "mlpmem_jax.cli", "tokens", f"--config={ROOT}/configs/smoke.py"]
    assert local.run_processes(command, absent) == EXIT_AGAIN
    output = capfd.readouterr().out
    assert "did not all find each other within 3 s" in output
    assert absent[0]["JAX_COORDINATOR_ADDRESS"] in output


def test_goodput_counts_what_is_done_again_as_lost():
    """A run of 10 s of which 6 s are steps, killed 4 s later, 5 s of pause, then 2 s of restoring and 8 s of steps."""

    def record(clock, **seconds):
        phases = {f"seconds/{phase}": 0.0 for phase in goodput.PHASES}
        return phases | {f"seconds/{name}": value for name, value in seconds.items()} | {"clock": clock, "step": 1}

    records = [record(110.0, compile=4.0, steps=6.0), {"step": 1, "loss": 2.0}, record(129.0, restore=2.0, steps=8.0)]
    spent = goodput.summary(records)
    assert spent["wall"] == 29.0
    assert spent["steps"] == 14.0
    assert spent["between runs"] == 9.0
    assert "goodput 48% of 29.0 s" in goodput.table(spent)
