"""kill -9 at random moments of every stage, then the same command again: the artifacts end with the same bytes.

MLPMEM_KILLS says how often each stage is killed (1 by default; ten a stage take about ten minutes on two cores).
"""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from workdirs import bytes_by_file

from mlpmem_jax import stages

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent
KILLS = int(os.environ.get("MLPMEM_KILLS", "1"))
OVERRIDES = [
    "--config.corpus.max_bytes=60000",
    "--config.tokenizer.vocab_size=300",
    "--config.base.context_length=32",
    "--config.base.width=16",
    "--config.base.training.steps=60",
    "--config.base.training.warmup_steps=5",
    "--config.base.training.checkpoint_every=20",
    "--config.base.training.evaluate_every=20",
    "--config.datastore.sequences_per_shard=64",
    "--config.targets.k=8",
    "--config.targets.quality_positions=64",
    "--config.memory.width=16",
    "--config.training.steps=60",
    "--config.training.warmup_steps=5",
    "--config.training.checkpoint_every=20",
    "--config.training.evaluate_every=20",
]
ARTIFACTS = {
    "tokens": ["tokens"],
    "base": ["base"],
    "datastore": ["datastore/train", "datastore/validation", "datastore/test"],
    "targets": ["targets/train", "targets/validation", "targets/test"],
    "train": ["memory"],
}
WORKING_FILES = {"checkpoints", "tensorboard", "metrics.jsonl", "parameters"}


def command(stage, workdir):
    return [
        sys.executable, "-m", "mlpmem_jax.cli", stage, "--quiet", "--config=configs/smoke.py",
        f"--config.workdir={workdir}", *OVERRIDES,
    ]  # fmt: skip


def environment():
    # One device, as at a desk; the suite's own eight are for tests of sharding. Compiled anew each time: kept programs
    # would make the killed runs shorter than the one that the moments of the kills are taken from.
    return {**os.environ, "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}


def finish(stage, workdir):
    done = subprocess.run(command(stage, workdir), cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def content(workdir, artifact):
    """Bytes of every file of an artifact; of parameters the manifest's fingerprint speaks, Orbax's files hold times."""
    return bytes_by_file(workdir / artifact, leave_out=WORKING_FILES)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A finished working directory, and the seconds that each stage took."""
    workdir = tmp_path_factory.mktemp("uninterrupted") / "run"
    seconds = {}
    for stage in ARTIFACTS:
        start = time.monotonic()
        finish(stage, workdir)
        seconds[stage] = time.monotonic() - start
    return workdir, seconds


@pytest.mark.parametrize("stage", list(ARTIFACTS))
def test_a_killed_stage_ends_with_the_same_bytes(stage, uninterrupted, tmp_path):
    reference, seconds = uninterrupted
    moments = random.Random(stage)
    for kill in range(KILLS):
        workdir = tmp_path / f"run{kill}"
        workdir.mkdir()
        for earlier in list(ARTIFACTS)[: list(ARTIFACTS).index(stage)]:
            top = ARTIFACTS[earlier][0].split("/")[0]
            shutil.copytree(reference / top, workdir / top)
        process = subprocess.Popen(
            command(stage, workdir), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        # The start of the process is of no interest: the kill falls in the later part of what the stage took.
        time.sleep(seconds[stage] * moments.uniform(0.3, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        finish(stage, workdir)
        for artifact in ARTIFACTS[stage]:
            assert content(workdir, artifact) == content(reference, artifact), f"{artifact} differs after kill {kill}"


def test_every_stage_that_makes_artifacts_is_killed():
    assert set(ARTIFACTS) == set(stages.STAGES) - {"evaluate"}
