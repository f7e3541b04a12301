"""Jobs of several real processes (gloo between them) against one process; kills, lost coordinators, preemption.

The reference is one process with one device; jobs that were stopped resume with another number of processes on another
mesh. MLPMEM_KILLS=2 adds those that take long.
"""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from typing import NamedTuple

import numpy as np
import pytest
from workdirs import bytes_by_file, small_config

from launch import local
from mlpmem_jax import stages
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.training import goodput

ROOT = pathlib.Path(__file__).parent.parent
KILLS = int(os.environ.get("MLPMEM_KILLS", "1"))
STEPS, EVERY = 12, 4
EXIT_AGAIN, KILLED = 75, -9
DATA = ("tokens", "base", "datastore")


class Job(NamedTuple):
    """So many processes with so many devices each, on a mesh of fsdp x tensor."""

    processes: int
    devices: int = 1
    mesh: str = "-1x1"


def small(workdir, backend="auto"):
    corpus = {"source": "files", "path": f"{ROOT}/docs", "document_bytes": 2048}
    config = small_config(workdir, steps=STEPS, every=EVERY, **{f"corpus__{key}": corpus[key] for key in corpus})
    for settings in (config.base.training, config.training):
        settings.update({"evaluation_sequences": 16, "optimizer": "adamw", "learning_rate": 0.003})
    config.datastore.update({"sequences_per_shard": 512, "batch_sequences": 64})
    config.targets.update({"backend": backend, "k": 5, "temperature": 3.0, "quality_positions": 64})
    config.evaluation.sharpness_positions = 50
    return config


def launch(workdir, stages, job, fault="none", backend="auto"):
    """Runs a job to its end, which no launcher hastens: (exit code of each process, what each printed)."""
    command = [sys.executable, str(ROOT / "tests" / "job_process.py"), str(workdir), stages, job.mesh, backend, fault]
    return run_processes(command, local.environments(job.processes, job.devices, local.free_port()), job.devices)


def run_processes(command, environments, devices=1):
    with tempfile.TemporaryDirectory() as folder:
        logs = [pathlib.Path(folder, f"{index}.log") for index in range(len(environments))]
        running = []
        for log, environment in zip(logs, environments, strict=True):
            variables = {
                "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}",
                "MLPMEM_LOST_SECONDS": "10",
                "MLPMEM_QUIET": "0",
                "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            }
            with log.open("wb") as file:
                process = subprocess.Popen(
                    command, env=os.environ | environment | variables, stdout=file, stderr=subprocess.STDOUT
                )
            running.append(process)
        try:
            codes = [process.wait(timeout=300) for process in running]
        finally:
            for process in running:
                process.kill()
        return codes, [log.read_text(errors="replace") for log in logs]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes") / "run"
    codes, printed = launch(folder, ",".join(stages.STAGES), Job(1))
    assert codes == [0], printed
    return folder


def seeded(reference, tmp_path, *names):
    workdir = tmp_path / "run"
    for name in names:
        shutil.copytree(reference / name, workdir / name)
    return workdir


def losses(workdir, name):
    records = [json.loads(line) for line in (workdir / name / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def assert_same_losses(workdir, reference, name):
    expected, actual = losses(reference, name), losses(workdir, name)
    assert list(actual) == list(expected) == list(range(EVERY, STEPS + 1, EVERY))
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=1e-4)


def assert_same(workdir, reference, stage):
    """The same bytes; but keys are float16 of states that differ in the last bits of float32."""
    if stage != "datastore":
        assert bytes_by_file(workdir / stage) == bytes_by_file(reference / stage)
        return
    for split in ("train", "validation", "test"):
        ours, theirs = (open_artifact(at / "datastore" / split, "datastore") for at in (workdir, reference))
        assert ours.arrays == theirs.arrays
        sequences = theirs.arrays["keys"].shape[0]
        for name in theirs.arrays:
            actual, expected = (artifact.read(name, 0, sequences).astype(np.float64) for artifact in (ours, theirs))
            np.testing.assert_allclose(actual, expected, atol=5e-3 if theirs.arrays[name].dtype[0] == "f" else 0)


def assert_lost(codes, printed):
    """Process 1 was killed, and the others said so as their last word."""
    assert codes[1] == KILLED
    for index in set(range(len(codes))) - {1}:
        assert codes[index] == EXIT_AGAIN, printed[index]
        assert "mlpmem: error: another process of the job was lost. Completed work is kept" in printed[index]
        assert printed[index].count("mlpmem: error") == 1
        assert "Traceback" not in printed[index]


def test_two_processes_that_start_apart_make_what_one_makes(reference, tmp_path):
    workdir = seeded(reference, tmp_path)
    assert launch(workdir, "tokens,base,datastore", Job(2), "late")[0] == [0, 0]
    assert_same(workdir, reference, "tokens")
    assert_same_losses(workdir, reference, "base")
    assert_same(workdir, reference, "datastore")


@pytest.mark.parametrize(
    ("stage", "killed", "again"),
    [("targets", Job(2), Job(1))]
    + [
        ("tokens", Job(2), Job(4)),
        ("tokens", Job(4), Job(2)),
        ("datastore", Job(2), Job(4)),
        ("datastore", Job(4), Job(2, 2, "2x2")),
        ("targets", Job(2), Job(4)),
        ("targets", Job(4), Job(2)),
    ]
    * (KILLS - 1),
)
def test_a_killed_stage_is_finished_by_another_number_of_processes(reference, tmp_path, stage, killed, again):
    workdir = seeded(reference, tmp_path, *{"tokens": (), "datastore": ("tokens", "base")}.get(stage, DATA))
    fault = "killed_in_targets" if stage == "targets" else "killed_in_shard"
    assert_lost(*launch(workdir, stage, killed, fault))
    assert launch(workdir, stage, again)[0] == [0] * again.processes
    assert_same(workdir, reference, stage)


@pytest.mark.parametrize(
    ("fault", "killed", "again"),
    [
        # In the job of two, both read the same rows.
        pytest.param("killed_in_save", Job(2, 1, "1x2"), Job(4, 1, "2x2"), marks=pytest.mark.slow),
    ]
    + [
        ("killed_in_step", Job(2, 2, "2x2"), Job(4, 1, "4x1")),
        ("killed_in_step", Job(4, 1, "2x2"), Job(2, 2, "4x1")),
        ("killed_in_step", Job(4, 1, "1x4"), Job(2, 1, "2x1")),
        ("killed_in_save", Job(4, 1, "4x1"), Job(2, 2, "1x4")),
    ]
    * (KILLS - 1),
)
def test_a_killed_training_resumes_with_other_processes_on_another_mesh(reference, tmp_path, fault, killed, again):
    workdir = seeded(reference, tmp_path, *DATA, "targets")
    assert_lost(*launch(workdir, "train", killed, fault))
    codes, printed = launch(workdir, "train", again)
    assert codes == [0] * again.processes
    # The second may be complete: where it was killed in that save, if the save's thread was faster.
    began = re.findall(r"resumes from the checkpoint at step (\d+) of", printed[0])
    assert began in ([str(EVERY)], [str(2 * EVERY)]), printed[0]
    assert_same_losses(workdir, reference, "memory")


def test_a_notice_to_one_process_leads_to_one_checkpoint_of_all(reference, tmp_path):
    workdir = seeded(reference, tmp_path, *DATA, "targets")
    codes, printed = launch(workdir, "train", Job(2), "preempted_in_step")
    assert codes == [EXIT_AGAIN] * 2
    lines = "".join(printed).splitlines()
    stopped = {line.split("at step ")[1].split(",")[0] for line in lines if "preempted;" in line}
    assert len(stopped) == 1  # both say the same step
    assert (workdir / "memory" / "checkpoints" / stopped.pop()).exists()
    assert launch(workdir, "train", Job(1, 8))[0] == [0]
    actual, expected = losses(workdir, "memory"), losses(reference, "memory")
    np.testing.assert_allclose([actual[step] for step in expected], list(expected.values()), rtol=1e-4)
    records = [json.loads(line) for line in (workdir / "memory" / "metrics.jsonl").read_text().splitlines()]
    spent = goodput.summary(records)
    assert spent["restore"] > 0
    assert spent["between runs"] > 0
    assert spent["wall"] == pytest.approx(sum(value for phase, value in spent.items() if phase != "wall"))


@pytest.mark.parametrize("stage", ["datastore", "tokens"][:KILLS])
def test_a_notice_to_one_process_ends_all_in_the_middle_of_another_stage(reference, tmp_path, stage):
    """Process 1 is busy on the host for longer than the test waits; 0 waits for it, on the devices or at a barrier."""
    earlier = {"datastore": ["tokens", "base"], "tokens": []}[stage]
    workdir = seeded(reference, tmp_path, *earlier)
    codes, printed = launch(workdir, stage, Job(2), "preempted_in_shard")
    assert codes == [EXIT_AGAIN] * 2
    for text in printed:
        assert text.count("mlpmem: error") == text.count("mlpmem: error: the job was preempted. Completed work") == 1
        assert "Traceback" not in text
    assert launch(workdir, stage, Job(1))[0] == [0]
    assert_same(workdir, reference, stage)


def test_two_processes_evaluate_and_generate_as_one(reference, tmp_path):
    workdir = seeded(reference, tmp_path, *DATA, "targets", "memory")
    codes, printed = launch(workdir, "evaluate,generate", Job(2))
    assert codes == [0, 0]
    ours, theirs = (json.loads((at / "report" / "metrics.json").read_text()) for at in (workdir, reference))
    for name, value in theirs["perplexity"]["test"].items():
        assert ours["perplexity"]["test"][name] == pytest.approx(value, rel=1e-5)
    assert "".join(printed).count("base LM + memory") == 1  # the first process alone prints


def test_a_coordinator_that_is_not_there_is_named_in_bounded_time(monkeypatch):
    monkeypatch.setenv("MLPMEM_JOIN_SECONDS", "3")
    absent = local.environments(2, 1, local.free_port())[1:]
    command = [sys.executable, "-m", "mlpmem_jax.cli", "tokens", f"--config={ROOT}/configs/smoke.py"]
    codes, (output,) = run_processes(command, absent)
    assert codes == [EXIT_AGAIN]
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


def test_a_stopwatch_gives_every_second_to_one_phase(monkeypatch):
    clock = iter([103.0, 105.0, 106.0, 110.0])
    monkeypatch.setattr(goodput.time, "time", lambda: next(clock))
    watch = goodput.Stopwatch(100.0)
    watch.lap("start-up")
    watch.lap("steps")
    first = watch.record()
    watch.lap("input wait")
    watch.lap("steps")
    second = watch.record()
    assert (first["clock"], first["seconds/start-up"], first["seconds/steps"]) == (105.0, 3.0, 2.0)
    assert (second["clock"], second["seconds/start-up"], second["seconds/steps"]) == (110.0, 0.0, 4.0)
    assert watch.spent("steps", "input wait") == 7.0


@pytest.mark.parametrize("mesh", [pytest.param("2x1", marks=pytest.mark.slow), "1x2"])
def test_what_training_starts_from_may_span_processes(tmp_path, mesh):
    """The memory's output projection from the base, and the controls, which train the base itself on.

    With a `tensor` axis the vocabulary of 301 is one that the mesh does not divide.
    """
    stages = "tokens,base,datastore,targets,train,controls"
    codes, outputs = launch(tmp_path, stages, Job(2, 1, mesh), "output_from_base", "exact")
    assert codes == [0, 0], outputs
    assert open_artifact(tmp_path / "tokens", "tokens").summary["vocab_size"] == 301
    for folder, kind in (("memory", "memory"), ("controls/ce_only", "memory"), ("controls/continued", "base")):
        assert np.isfinite(open_artifact(tmp_path / folder, kind).summary["validation"]["perplexity"])
