"""Configs: every file of configs/ is sound, and what is wrong is refused by name before any compute."""

import importlib
import pathlib
import subprocess
import sys

import pytest

from configs import default
from mlpmem_jax import cli
from mlpmem_jax.core import config as configs
from mlpmem_jax.core.errors import ConfigError

FILES = sorted(file.stem for file in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_every_config_is_sound(name):
    configs.check(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("targets.k", 0, r"config.targets.k: expected a whole number, 1 or more, found 0"),
        ("targets.k", True, r"config.targets.k: expected a whole number"),
        ("targets.temperature", -2.0, r"a number, 0 or more, found -2.0"),
        ("targets.backend", "faiss", r"one of 'auto', 'scann', 'exact', found 'faiss'"),
        ("corpus.source", "files", r"config.corpus.path: is needed"),
        ("corpus.validation_fraction", 0.97, r"leave nothing to train on"),
        ("base.heads", 3, r"config.base.heads: 3 does not divide config.base.width, 64"),
        ("base.source", "huggingface", r"config.base.path: is needed"),
        ("tokenizer.vocab_size", 100, r"config.tokenizer.vocab_size: expected 257 or more"),
        ("training.epochs", 0, r"config.training: steps and epochs are both 0"),
        ("training.accumulation_steps", 3, r"3 does not divide"),
        ("training.alpha", 1.5, r"config.training.alpha: expected a number from 0 to 1, found 1.5"),
        ("memory.output_from_base", True, r"config.memory.output_from_base: needs"),
        ("mesh.rules.vocab", "model", r"config.mesh.rules.vocab: expected mesh axes"),
        ("workdir", "", r"config.workdir: expected a path"),
    ],
)
def test_bad_values_are_named(key, value, message):
    config = default.get_config()
    with config.ignore_type():
        config.update_from_flattened_dict({key: value})
    with pytest.raises(ConfigError, match=message):
        configs.check(config)


def test_unknown_and_missing_keys_are_named():
    config = default.get_config()
    config.targets.neighbours = 3
    with pytest.raises(ConfigError, match=r"config.targets.neighbours: no such key"):
        configs.check(config)
    config = default.get_config()
    del config.targets.k
    with pytest.raises(ConfigError, match=r"config.targets.k: is missing"):
        configs.check(config)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--config.trainig.alpha=0.1"], "did you mean 'training'"),
        (["--config.training.alhpa=0.1"], "did you mean 'training.alpha'"),
        (["--config.training.alpha=much"], "alpha"),
        (["--alpha=0.1"], "unknown option"),
    ],
)
def test_bad_overrides_are_explained(overrides, message):
    with pytest.raises(ConfigError, match=message):
        cli.read_config("configs/default.py", overrides)


def test_overrides_reach_the_config():
    config = cli.read_config(
        "configs/smoke.py", ["--config.targets.temperature=2.5", "--config.workdir=runs/x", "--config.training.remat"]
    )
    assert (config.targets.temperature, config.workdir, config.training.remat) == (2.5, "runs/x", True)
    assert cli.read_config("configs/smoke.py", []).targets.temperature == 0.0


def test_a_bad_config_costs_no_start_of_the_accelerator_runtime(tmp_path):
    """The check imports neither jax nor tensorstore, and the command exits with 2 and one line."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlpmem_jax.cli", "run", "--config=configs/smoke.py",
         "--config.targets.k=0", f"--config.workdir={tmp_path}/w"],
        capture_output=True, text=True, cwd=pathlib.Path(__file__).parent.parent,
    )  # fmt: skip
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert done.returncode == 2
    assert len(lines) == 1
    assert "config.targets.k" in lines[0]
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not imported & {"jax", "tensorstore", "numpy", "scann"}
    assert not (tmp_path / "w").exists()
