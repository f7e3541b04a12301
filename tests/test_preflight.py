"""What config, devices and finished artifacts contradict is told before any compute, by `run` and by launchers."""

import contextlib
import functools
import importlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from configs import smoke, wikitext103_gpt2_large
from launch import job
from mlpmem_jax import cli, stages
from mlpmem_jax.core import preflight
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter
from mlpmem_jax.core.config import mesh_rules
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import published
from mlpmem_jax.models import language_model

TOKENS = 6401  # 100 sequences of 64 positions, and the last target


def write_tokens(workdir, documents=5):
    spec = ArraySpec((1, 8192), "uint16", 1, (1, 4096))
    lengths = {"train": TOKENS, "validation": 300, "test": 200}
    writer = ArtifactWriter.create(workdir / "tokens", "tokens", {}, {}, dict.fromkeys(lengths, spec))
    writer.write_shard(0, {split: np.arange(length)[None] % 1000 for split, length in lengths.items()})
    writer.seal({"documents": {"train": documents}, "vocab_size": 1000})


def write_base(workdir, width):
    ArtifactWriter.create(workdir / "base", "base", {}, {}, {}).seal({"model": {"width": width}})


def write_memory(folder):
    model = {"family": "gpt2", "width": 64, "blocks": 2, "feed_forward_width": 256}
    ArtifactWriter.create(folder, "memory", {}, {}, {}).seal({"model": model})


@pytest.mark.parametrize(
    ("changes", "documents", "message"),
    [
        ({"targets.k": 6400}, 5, r"config.targets.k: 6400 neighbors, .* 6,400 positions in 100 sequences"),
        ({"targets.exclude": "document"}, 1, r"config.targets.exclude: .* single document"),
        ({"training.batch_sequences": 104}, 5, r"config.training.batch_sequences: 104 sequences per step"),
        ({"training.steps": 0}, 5, r"config.training.warmup_steps: 50 .* none of the 12 steps of .*epochs=1.0"),
        (
            {"base.training.steps": 0, "base.training.epochs": 0.01},
            5,
            r"config.base.training.warmup_steps: .* the 0 steps",
        ),
        (
            {"base.source": "huggingface", "base.path": "x", "memory.output_from_base": True},
            5,
            r"config.memory.output_from_base: needs config.memory.width \(64\) .* width \(48\)",
        ),
        (
            {"base.source": "huggingface", "base.path": "x", "targets.search_dimensions": 48},
            5,
            r"config.targets.search_dimensions: expected fewer than the 48 dimensions",
        ),
        ({"base.context_length": 200}, 5, r"config.base.context_length: 200 .* the 200 tokens of the test split"),
        ({"training.start": "HERE/none"}, 5, r"config.training.start: expected .* a finished memory, found none at"),
        ({"training.start": "HERE/base"}, 5, r"config.training.start: expected .* a finished memory, found none at"),
        (
            {"training.start": "HERE/memory", "memory.blocks": 3},
            5,
            r"config.training.start: .*/memory has blocks 2, the config asks for 3; set config.memory.blocks",
        ),
        (
            {"training.start": "HERE/memory", "memory.feed_forward_width": 128},
            5,
            r"has feed_forward_width 256, the config asks for 128",
        ),
    ],
)
def test_artifacts_that_the_config_contradicts(tmp_path, changes, documents, message):
    write_tokens(tmp_path, documents)
    write_base(tmp_path, 48)
    write_memory(tmp_path / "memory")
    changes = {
        key: value.replace("HERE", str(tmp_path)) if key == "training.start" else value
        for key, value in changes.items()
    }
    config = smoke.get_config()
    config.workdir = str(tmp_path)
    config.training.start = str(tmp_path / "memory")
    preflight.check_artifacts(config)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        preflight.check_artifacts(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"memory.width": 68},
            r"config.memory.width: 68 cannot be divided into 8 equal shards, over the mesh axes fsdp",
        ),
        (
            {"mesh.tensor": 8, "memory.feed_forward_width": 100},
            r"config.memory.feed_forward_width: 100 cannot .* tensor",
        ),
        ({"base.width": 68}, r"config.base.width: 68 cannot be divided into 8 equal shards"),
        ({"mesh.rules.embed": "tensor"}, r"config.mesh.rules: the axes of 'embed' \('tensor',\) must be among"),
        ({"mesh.rules.vocab": "fsdp"}, r"config.mesh.rules: .* and 'vocab' \('fsdp',\) must not"),
    ],
)
def test_dimensions_and_rules_that_the_mesh_contradicts(changes, message):
    config = smoke.get_config()
    preflight.check_devices(config, 8, 2)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        preflight.check_devices(config, 8, 2)
    if not any(key.startswith("mesh.rules") for key in changes):
        preflight.check_devices(config, 8, 2, stage="tokens")  # which has no memory


@pytest.mark.parametrize(
    ("stage", "changes", "groups"),
    [
        ("run", {}, ["datastore", "training", "base.training"]),
        ("run", {"base.source": "huggingface"}, ["datastore", "training"]),
        ("tokens", {}, []),
        ("base", {}, ["base.training"]),
        ("base", {"base.source": "huggingface"}, []),
        ("base", {"base.source": "huggingface", "base.finetune_steps": 10}, ["base.training"]),
        ("datastore", {}, ["datastore"]),
        ("targets", {}, []),
        ("train", {}, ["training"]),
        ("evaluate", {}, []),
        ("continued", {}, ["training"]),
        ("controls", {}, ["training", "base.training"]),
        ("controls", {"base.source": "huggingface", "base.finetune_steps": 10}, ["training"]),
        ("compare", {"comparison.systems": "base,memory,knn_lm"}, []),
        ("compare", {"comparison.systems": "base,lora"}, ["training"]),
        ("compare", {"comparison.systems": "base,cpt+memory"}, ["base.training"]),
        ("compare", {"comparison.systems": "base,cpt", "base.source": "huggingface"}, ["training"]),
    ],
)
def test_only_the_batches_of_the_stage_are_checked(stage, changes, groups):
    config = smoke.get_config()
    for name in ("datastore", "training", "base.training"):
        config.update_from_flattened_dict({f"{name}.batch_sequences": 12})
    config.update_from_flattened_dict(changes)
    refused = contextlib.nullcontext()
    if groups:
        refused = pytest.raises(
            ConfigError, match="^" + "".join(f"config.{name}.batch_sequences: [^;]*; " for name in groups) + "an acc"
        )
    with refused:
        preflight.check_devices(config, 8, 2, stage)


def test_an_empty_workdir_contradicts_nothing(tmp_path):
    config = smoke.get_config()
    config.workdir = str(tmp_path / "none")
    preflight.check_artifacts(config)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base.context_length": 1025}, "config.base.context_length: 1025 is longer than the 1024 positions of"),
        ({"memory.output_from_base": True, "memory.width": 768}, r"config.memory.output_from_base: .* width \(1280\)"),
        ({"datastore.key_model": "mistralai/Mistral-7B-v0.3"}, "config.datastore.key_model: .* vocabulary of 32768"),
        ({"memory.width": 512}, "the memory reads its width, 1280, which cannot be divided into 512 equal shards"),
    ],
)
def test_what_is_known_of_the_models_is_checked_before_any_of_them_is_there(changes, message):
    config = wikitext103_gpt2_large.get_config()
    preflight.check_models(config, 256)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        preflight.check_models(config, 512 if list(changes.values()) == [512] else 256)


@pytest.mark.parametrize(("name", "devices", "tensor"), [("large", 256, 2), ("large", 128, 1), ("medium", 512, 4)])
def test_the_ready_configs_run_on_the_slices_that_are_priced(name, devices, tensor):
    """Targets come from GPT-2 xl, whose 25 heads and width of 1600 no such mesh divides."""
    config = importlib.import_module(f"configs.wikitext103_gpt2_{name}").get_config()
    config.mesh.tensor = tensor
    preflight.check_models(config, devices)
    sizes = (1, devices // tensor, tensor)
    sharding = Sharding(jax.sharding.AbstractMesh(sizes, ("slice", "fsdp", "tensor")), mesh_rules(config))
    model = published.dimensions(config.datastore.key_model)
    abstract = jax.eval_shape(functools.partial(language_model.init, model), jax.random.key(0))
    placed = sharding.tree(language_model.logical_axes(model), abstract)
    jax.tree.map(lambda array, named: named.shard_shape(array.shape), abstract, placed)  # raises where uneven


def test_run_and_launchers_ask_before_the_first_stage(tmp_path, monkeypatch, capsys):
    write_tokens(tmp_path)
    words = ["--config=configs/smoke.py", f"--config.workdir={tmp_path}", "--config.targets.k=7000"]
    for stage in stages.STAGES:
        monkeypatch.setattr(f"{stages.STAGES[stage][0]}.run", lambda config: pytest.fail("a stage ran"))
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", *words])
    assert "config.targets.k: 7000 neighbors" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"config.targets.k: 7000"):
        job.read_config("configs/smoke.py", words[1:], stage="run", devices=1, processes=1)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["run", *words[:2], "--config.training.batch_sequences=12"])  # on eight devices
    assert "config.training.batch_sequences: expected a multiple of 8, found 12" in capsys.readouterr().err


def test_launchers_need_no_accelerator_runtime():
    code = "import sys, launch.local, launch.jobset; sys.exit(bool({'jax', 'tensorstore', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
