"""What the launchers share: no accelerator runtime, configs checked against the devices, the config that is sent."""

import argparse
import pathlib
import shutil
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from launch import job, slurm
from mlpmem_jax.core import config_files
from mlpmem_jax.core.errors import ConfigError, UserError

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = str(ROOT / "configs" / "default.py")
WITHOUT_ACCELERATORS = """
import sys
for name in ("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore", "torch", "tensorflow", "scann", "numpy"):
    sys.modules[name] = None
sys.argv = ["launch"]
from launch import jobset, local, slurm, tpu_vm
tpu = ["--name=a", "--accelerator=v5e-16", "--image=I", "--config.workdir=gs://b/r"]
for launcher, arguments in (
    (jobset, tpu),
    (tpu_vm, [*tpu, "--zone=z"]),
    (slurm, ["--nodes=1", "--gpus_per_node=8", "--time=1:00"]),
    (local, ["--processes=2"]),
):
    try:
        launcher.main(["--config=CONFIG", "--dry_run", *arguments])
    except SystemExit as end:
        assert end.code == 0, end.code
"""


def options(**changes) -> argparse.Namespace:
    given = {
        "config": CONFIG,
        "stage": "run",
        "slices": 1,
        "name": "a",
        "accelerator": "v5litepod-16",
        "max_restarts": 1,
        "image": "I",
        "service_account": None,
    }
    return argparse.Namespace(**(given | changes))


def test_launching_needs_no_accelerator_runtime():
    script = WITHOUT_ACCELERATORS.replace("CONFIG", CONFIG)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "kind: JobSet" in done.stdout
    assert "queued-resources create" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "devices", "processes", "slices", "message"),
    [
        (["--config.mesh.tensor=3"], 16, 4, 1, r"config.mesh: .* 1 x -1 x 3 does not fit 16 devices"),
        (["--config.mesh.fsdp=8"], 16, 4, 1, r"config.mesh: .* 1 x 8 x 1 does not fit 16 devices"),
        (["--config.mesh.tensor=-1"], 16, 4, 1, r"config.mesh: .* does not fit 16 devices"),
        ([], 16, 4, 2, r"config.mesh.slice: expected a multiple of --slices=2.*--config.mesh.slice=2"),
        ([], 256, 64, 1, r"config.datastore.batch_sequences: expected a multiple of 256, found 32; config.training"),
        (["--config.training.accumulation_steps=2"], 16, 4, 1, r"config.training.batch_sequences: .* multiple of 32, "),
        (["--config.training.widht=2"], 16, 4, 1, r"config.training.widht: no such key"),
    ],
)
def test_configs_that_cannot_work_on_the_devices_are_refused(overrides, devices, processes, slices, message):
    with pytest.raises(ConfigError, match=message):
        job.read_config(CONFIG, overrides, stage="run", devices=devices, processes=processes, slices=slices)


def test_an_imported_base_needs_no_batch_that_divides(tmp_path):
    (tmp_path / "config.py").write_text(
        "from configs import default\n\n\ndef get_config():\n    config = default.get_config()\n"
        "    config.base.training.batch_sequences = 7\n    return config\n"
    )
    imported = ["--config.base.source=huggingface", "--config.base.path=gpt2"]
    imported += ["--config.tokenizer.source=hub", "--config.tokenizer.path=gpt2"]
    job.read_config(str(tmp_path / "config.py"), imported, stage="run", devices=16, processes=4)
    with pytest.raises(ConfigError, match=r"config.base.training.batch_sequences"):
        job.read_config(str(tmp_path / "config.py"), [], stage="run", devices=16, processes=4)


@pytest.mark.parametrize(
    ("changes", "overrides", "message"),
    [
        ({}, [], r"config.workdir: 'runs/default' would be lost"),
        (
            {},
            ["--config.workdir=az://b/r"],
            "config.workdir: az://b/r: expected a path, or a URL that begins with gs://",
        ),
        ({"name": "My_job"}, ["--config.workdir=gs://b/r"], "--name=My_job: expected lowercase letters"),
        ({"name": "a" * 41}, ["--config.workdir=gs://b/r"], "at most 40 characters"),
        ({"slices": 0}, ["--config.workdir=gs://b/r"], "--slices=0: expected 1 or more"),
        ({"image": ""}, ["--config.workdir=gs://b/r"], "--image=: expected a word without spaces"),
        ({"accelerator": "v5e-17"}, ["--config.workdir=gs://b/r"], "no such slice"),
        ({"config": "nowhere.py"}, [], "no such file"),
    ],
)
def test_jobs_that_cannot_work_on_tpu_slices_are_refused(changes, overrides, message):
    with pytest.raises(UserError, match=message):
        job.read_tpu_job(options(**changes), overrides, longest_name=40)


def test_variables_are_added_to_those_of_the_launcher():
    given = ["XLA_FLAGS=--a=1 --b='$c'", "EMPTY=", "_2="]
    own = {"JAX_PLATFORMS": "tpu"}
    assert job.environment(own, given) == {**own, "XLA_FLAGS": "--a=1 --b='$c'", "EMPTY": "", "_2": ""}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("TMPDIR", "--env='TMPDIR': expected NAME=VALUE"),
        ("=/tmp", "expected NAME=VALUE"),
        ("2=x", "expected NAME=VALUE"),
        ("A-B=x", "expected NAME=VALUE"),
        ("A=1\nB=2", r"--env='A=1.nB=2': expected .* a single line"),
        ("JAX_PLATFORMS=cpu", "--env=JAX_PLATFORMS=cpu: this launcher sets JAX_PLATFORMS=tpu itself"),
    ],
)
def test_variables_that_cannot_be_set_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        job.environment({"JAX_PLATFORMS": "tpu"}, [given])


def test_what_only_this_machine_has_is_pointed_out(tmp_path, capsys):
    words = [f"--config.{name}" for name in ("workdir=gs://b/r", "corpus.source=files", f"corpus.path={tmp_path}")]
    job.read_tpu_job(options(), words, longest_name=40)
    assert f"warning: config.corpus.path: {tmp_path} is a local path" in capsys.readouterr().err
    words[2] = "--config.corpus.path=gs://b/text"
    job.read_tpu_job(options(), words, longest_name=40)
    assert capsys.readouterr().err == ""
    words += ["--config.comparison.systems=rag", f"--config.comparison.retriever={tmp_path}"]
    job.read_tpu_job(options(), words, longest_name=40)
    assert capsys.readouterr().err == ""
    job.read_tpu_job(options(stage="compare"), words, longest_name=40)
    assert f"warning: config.comparison.retriever: {tmp_path} is a local path" in capsys.readouterr().err


@settings(deadline=None, max_examples=30)
@given(name=st.text(max_size=300), learning_rate=st.floats(0, 10), seed=st.integers(0, 2**32 - 1))
def test_the_config_that_is_sent_is_the_config_that_was_checked(tmp_path_factory, name, learning_rate, seed):
    config = config_files.read(CONFIG, [])
    config.corpus.text_key, config.training.learning_rate, config.training.seed = name, learning_rate, seed
    file = tmp_path_factory.mktemp("sent") / "config.py"
    file.write_text(
        job.config_file(config, CONFIG, [f"--config.corpus.text_key={name}"]), encoding="utf-8", newline="\n"
    )
    assert config_files.read(str(file), []) == config


def test_a_command_that_is_not_installed_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="'kubectl' is not installed"):
        job.send(["kubectl", "apply"], "")


def _read_and_succeed(options, overrides) -> int:
    job.read_config(options.config, overrides, stage="run", devices=1, processes=1)
    return 0


def test_home_is_home_in_every_path_of_launchers(monkeypatch, tmp_path, capsys):
    """A shell expands none in --config=~/c.py; a quoted one in a script would be a folder named ~."""
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(CONFIG, tmp_path / "c.py")
    with pytest.raises(SystemExit, match="0"):
        slurm.main(["--config=~/c.py", "--venv=~/venv", "--nodes=1", "--gpus_per_node=8", "--time=1:00", "--dry_run"])
    script = capsys.readouterr().out
    assert f'    {tmp_path}/venv/bin/mlpmem run "--config=$config"' in script
    assert f"from --config={tmp_path}/c.py" in script
    with pytest.raises(SystemExit, match="2"):
        job.parser("test", "", "").parse_args(["--config=~nobody_of_this_name/c.py"])
    assert "is not the home of a user" in capsys.readouterr().err


def test_errors_are_one_line_and_exit_code_2(capsys):
    parser = job.parser("test", "", "")
    for arguments in (["--config=nowhere.py"], [f"--config={CONFIG}", "--dryrun"]):
        with pytest.raises(SystemExit) as end:
            job.run(parser, _read_and_succeed, arguments)
        assert end.value.code == 2
        assert capsys.readouterr().err.count("error: ") == 1
