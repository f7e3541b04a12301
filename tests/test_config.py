"""Configs: every file of configs/ is sound, and what is wrong is refused by name before any compute."""

import importlib
import os
import pathlib
import re
import subprocess
import sys
import types

import ml_collections
import pytest
from etils import epath

from configs import default
from mlpmem_jax import cli
from mlpmem_jax.core import config_files, storage
from mlpmem_jax.core.config import PATHS, USED_WITH, check_config, expand_home, first_unknown, value_of
from mlpmem_jax.core.errors import ConfigError, UserError

FILES = sorted(file.stem for file in (pathlib.Path(__file__).parent.parent / "configs").glob("*.py"))


@pytest.mark.parametrize("name", [name for name in FILES if name != "__init__"])
def test_every_config_is_sound(name):
    check_config(importlib.import_module(f"configs.{name}").get_config())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("targets.k", 0, r"config.targets.k: expected a whole number, 1 or more, found 0"),
        ("targets.k", True, r"config.targets.k: expected a whole number"),
        ("targets.temperature", -2.0, r"a number from 1e-6 to 1e9, or 0 for the best one, found -2.0"),
        ("targets.backend", "faiss", r"one of 'auto', 'scann', 'exact', found 'faiss'"),
        ("corpus.source", "files", r"config.corpus.path: is needed"),
        ("corpus.validation_fraction", 0.97, r"leave nothing to train on"),
        ("base.heads", 3, r"config.base.heads: 3 does not divide config.base.width, 64"),
        ("base.source", "huggingface", r"config.base.path: is needed"),
        (
            "base",
            {"source": "gguf", "path": "m.gguf"},
            r"config.tokenizer.source: 'train' makes a new tokenizer, whose",
        ),
        (
            "corpus",
            {"source": "files", "path": "runs"},
            r"config.workdir: runs/default is in the folder of .*path, runs",
        ),
        ("corpus", {"source": "hub", "name": "a/b,."}, r"config.workdir: runs/default is in the folder of .*name, \."),
        ("tokenizer.vocab_size", 100, r"config.tokenizer.vocab_size: expected 257 or more"),
        ("training.epochs", 0, r"config.training: steps and epochs are both 0"),
        ("training.accumulation_steps", 3, r"3 does not divide"),
        ("training.alpha", 1.5, r"config.training.alpha: expected a number from 0 to 1, found 1.5"),
        ("memory.output_from_base", True, r"config.memory.output_from_base: needs"),
        ("mesh.rules.vocab", "model", r"config.mesh.rules.vocab: expected mesh axes"),
        ("workdir", "", r"config.workdir: expected a path"),
        ("workdir", "C:\\runs", r"config.workdir: expected a path in UTF-8 .*, without '\\', found 'C:"),
        ("workdir", "caf\udce9", r"config.workdir: expected a path in UTF-8 \(LC_ALL=C.UTF-8\), .* found 'caf\\udce9'"),
        ("training.seed", 2**32, r"config.training.seed: expected a whole number from 0 to 2\*\*32 - 1"),
        ("memory.width", 2**70, r"config.memory.width: expected a whole number"),
        ("training.learning_rate", float("inf"), r"config.training.learning_rate: expected a number, .* found inf"),
        ("training.steps", 2**31, r"config.training.steps: expected a whole number from 0 to 2\*\*31 - 1"),
        ("training.epochs", 1e300, r"config.training.epochs: expected a number from 0 to 1e6"),
        ("training.beta2", 1.0, r"config.training.beta2: expected a number from 0 to below 1"),
        ("training.steps", 30, r"config.training.warmup_steps: 50 steps of warmup leave none of the 30"),
        ("targets.temperature", 1e-40, r"config.targets.temperature: expected a number from 1e-6"),
        ("targets.minimum_probability", 1.0, r"may drop every one of config.targets.k = 64 .* less than 0.0156"),
        ("corpus.path", "text", r"config.corpus.path: 'text' has no effect with config.corpus.source='installed_docs'"),
    ],
)
def test_bad_values_are_named(key, value, message):
    config = default.get_config()
    with config.ignore_type():
        config.update({key: value} if isinstance(value, dict) else {})
        config.update_from_flattened_dict({} if isinstance(value, dict) else {key: value})
    with pytest.raises(ConfigError, match=message):
        check_config(config)


@pytest.mark.parametrize(
    ("corpus", "workdir"),
    [("text", "texts/run"), ("text", "text/.runs/a"), ("gs://b/text", "gs://b/text2"), ("a", "b")],
)
def test_a_workdir_that_the_corpus_does_not_contain(corpus, workdir):
    config = default.get_config()
    config.workdir = workdir
    config.corpus.update({"source": "files", "path": corpus})
    check_config(config)


def test_a_link_does_not_hide_that_the_workdir_is_in_the_corpus(tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "link").symlink_to("text")
    config = default.get_config()
    config.workdir = str(tmp_path / "link" / "run")
    config.corpus.update({"source": "files", "path": str(tmp_path / "text")})
    with pytest.raises(ConfigError, match=r"config\.workdir: .* is in the folder of config\.corpus\.path"):
        check_config(config)


def test_a_number_that_no_float_holds_is_named():
    values = default.get_config().to_dict()
    values["training"]["learning_rate"] = 10**400
    with pytest.raises(ConfigError, match=r"config.training.learning_rate: expected a number, 0 or more"):
        check_config(ml_collections.ConfigDict(values))


def test_unknown_and_missing_keys_are_named():
    config = default.get_config()
    config.targets.neighbours = 3
    with pytest.raises(ConfigError, match=r"config.targets.neighbours: no such key"):
        check_config(config)
    config = default.get_config()
    del config.targets.k
    with pytest.raises(ConfigError, match=r"config.targets.k: is missing"):
        check_config(config)


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
        config_files.read("configs/default.py", overrides)


def test_overrides_reach_the_config():
    config = config_files.read(
        "configs/smoke.py", ["--config.targets.temperature=2.5", "--config.workdir=runs/x", "--config.training.remat"]
    )
    assert (config.targets.temperature, config.workdir, config.training.remat) == (2.5, "runs/x", True)
    assert config_files.read("configs/smoke.py", []).targets.temperature == 0.0


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


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["corpus.path=DIR"], r"corpus.path: 'DIR' has no effect with config.corpus.source='installed_docs'"),
        (["corpus.name=a/b"], r"corpus.name: .* set config.corpus.source to 'hub'"),
        (["corpus.text_key=body"], r"corpus.text_key: .* 'files' or 'hub'"),
        (["tokenizer.path=a.json"], r"tokenizer.path: 'a.json' has no effect with config.tokenizer.source='train'"),
        (["base.path=gpt2"], r"base.path: 'gpt2' has no effect with config.base.source='train'"),
        (["base.source=huggingface", "base.path=gpt2", "base.width=128"], r"base.width: 128 has no effect"),
        (["corpus.document_bytes=100"], r"document_bytes: 100 has no effect .*; .* 'files' or 'hub'"),
        (
            ["corpus.source=files", "corpus.path=a", "corpus.group_part=_.*"],
            r"group_part: '_\.\*' has no effect with config.corpus.group_key=''",
        ),
        (["targets.backend=exact", "targets.leaves=9"], r"leaves: 9 has no effect with config.targets.backend='exact'"),
        (["targets.backend=scann", "targets.recall_target=0.5"], r"recall_target: 0.5 has no effect"),
        (
            ["training.start=m", "memory.width=64", "memory.output_from_base=True"],
            r"output_from_base: True has no effect with config.training.start='m'",
        ),
        (
            ["base.source=huggingface", "base.path=gpt2", "base.training.batch_sequences=24"],
            r"base.training.batch_sequences: 24 has no effect with config.base.source='huggingface'",
        ),
        (
            ["base.source=huggingface", "base.path=gpt2", "base.finetune_steps=9", "base.training.learning_rate=0.1"],
            r"base.training.learning_rate: 0.1 has no effect with config.base.source='huggingface'",
        ),
        (["training.epochs=3.0"], r"training.epochs: 3.0 has no effect with config.training.steps=100"),
        (
            ["training.optimizer=adamw", "training.adam_learning_rate=0.1"],
            r"adam_learning_rate: 0.1 has no effect with config.training.optimizer='adamw'; .* or set .* to 'muon'",
        ),
        (["comparison.systems=base,memory", "comparison.k=9"], r"comparison.k: 9 has no effect .*; .* to 'knn_lm'"),
        (["comparison.systems=base,knn_lm", "comparison.retriever=DIR"], r"retriever: .* 'rag' or 'memory\+rag'"),
    ],
)
def test_what_is_set_and_has_no_effect_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        config_files.read("configs/smoke.py", [f"--config.{word}" for word in overrides])


def test_what_one_of_several_systems_reads_has_an_effect():
    words = ["--config.comparison.systems=base,memory+rag,knn_lm", "--config.comparison.k=9"]
    config = config_files.read("configs/smoke.py", [*words, "--config.comparison.passages=2"])
    assert (config.comparison.k, config.comparison.passages) == (9, 2)


def test_what_fine_tuning_reads_has_an_effect():
    words = ["base.source=huggingface", "base.path=gpt2", "base.finetune_steps=9", "base.training.batch_sequences=24"]
    words += ["tokenizer.source=file", "tokenizer.path=t.json"]
    config = config_files.read("configs/smoke.py", [f"--config.{word}" for word in words])
    assert config.base.training.batch_sequences == 24


def test_a_source_that_is_overridden_takes_what_the_file_said_of_the_former_with_it():
    config = config_files.read(
        "configs/wikitext103_gpt2_small.py",
        [
            "--config.corpus.source=files",
            "--config.corpus.path=DIR",
            "--config.base.source=train",
            "--config.memory.width=64",
        ],
    )
    assert (config.corpus.name, config.corpus.subset, config.base.path) == ("", "", "")
    assert config_files.read("configs/smoke.py", ["--config.tokenizer.source=file", "--config.tokenizer.path=a.json"])


def test_every_key_of_the_table_exists():
    for key, (decider, values) in USED_WITH.items():
        for name in (key, decider):
            assert first_unknown([f"--config.{name}"]) is None
        group = default.get_config()
        for part in decider.split("."):
            group = group[part]
        assert type(group) is type(values[0])


def test_home_is_home_in_every_path(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    overrides = {
        "workdir": "~/x", "corpus.source": "files", "corpus.path": "~/text", "tokenizer.source": "file",
        "tokenizer.path": "~/t.json", "base.source": "huggingface", "base.path": "~/m", "training.start": "~/s",
        "datastore.key_model": "~/k", "comparison.data": "~/d", "comparison.retriever": "~/e",
    }  # fmt: skip
    config = config_files.read("configs/default.py", [f"--config.{key}={value}" for key, value in overrides.items()])
    actual = {key: value_of(config, key) for key, value in overrides.items() if value.startswith("~")}
    assert actual == {key: "/home/ada" + value[1:] for key, value in overrides.items() if value.startswith("~")}
    assert set(actual) == set(PATHS)
    words = ["export", "--config=~/c.py", "--format=reference", "--output=~/out"]
    options = cli._parser().parse_args(words)
    assert (options.config, options.output) == ("/home/ada/c.py", "/home/ada/out")
    with pytest.raises(ConfigError, match="~nobody_of_this_name is not the home of a user"):
        expand_home("~nobody_of_this_name/x")


def test_a_file_url_is_a_path():
    assert config_files.read("configs/smoke.py", ["--config.workdir=file:///runs/x"]).workdir == "/runs/x"
    with pytest.raises(UserError, match=r"config\.workdir: file://host/x: expected a path, or a URL"):
        config_files.read("configs/smoke.py", ["--config.workdir=file://host/x"])


@pytest.mark.parametrize(
    "words",
    [
        ["export", "--format=transformers", "--output=gs://bucket/x"],
        ["import", "--from=gs://bucket/x"],
        ["compare", "--config.comparison.data=gs://bucket/x"],
    ],
)
def test_a_bucket_is_not_taken_for_a_folder_here(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--config=configs/smoke.py"])
    assert stopped.value.code == 2
    assert "gs://bucket/x: expected a path on this machine" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["generate", "--prompt=The", f"--seed={10**20}"],
            "--seed: expected a whole number from 0 to 4294967295, found",
        ),
        (["generate", "--prompt=The", "--seed=-1"], "--seed: expected a whole number from 0"),
        (["generate", "--prompt=The", "--tokens=0"], "--tokens: expected a whole number of 1 or more, found '0'"),
        (["score", "--tasks=lm_eval:x", "--limit=-1"], "--limit: expected a whole number of 1 or more, found '-1'"),
        (["plan", "--topology=v5e:2x4", "--slices=0"], "--slices: expected a whole number of 1 or more, found '0'"),
        (["plan", "--topology=v5e:2x4", "--positions=-5"], "--positions: expected a whole number of 0 or more"),
        (["plan", "--topology=v5e:2x4", "--positions=1e9"], "--positions: .* found '1e9'"),
    ],
)
def test_numbers_of_options_are_checked_before_any_compute(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([*words, "--config=configs/smoke.py"])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_an_environment_for_another_program_does_not_change_the_arithmetic(monkeypatch):
    monkeypatch.setenv("JAX_ENABLE_X64", "1")  # float64 where the code leaves the type to JAX
    with pytest.raises(SystemExit):
        cli.main(["tokens", "--config=configs/smoke.py", "--config.targets.k=0"])
    assert os.environ["JAX_ENABLE_X64"] == "0"


def test_a_value_may_stand_after_a_space():
    words = ["--config.workdir", "/x", "--config.training.remat", "--config.targets.k", "8"]
    config = config_files.read("configs/smoke.py", words)
    assert (config.workdir, config.training.remat, config.targets.k) == ("/x", True, 8)
    with pytest.raises(ConfigError, match="/y: unknown option"):
        config_files.read("configs/smoke.py", ["--config.workdir=/x", "/y"])


def test_configs_means_the_ready_ones_inside_a_config_file_alone(tmp_path, monkeypatch):
    theirs = types.ModuleType("configs")
    monkeypatch.setitem(sys.modules, "configs", theirs)
    path = list(sys.path)
    file = tmp_path / "mine.py"
    file.write_text("def get_config():\n    from configs import smoke\n\n    return smoke.get_config()\n")
    assert config_files.read(str(file), []).targets.k == 16
    assert sys.modules["configs"] is theirs
    assert sys.path == path


def test_a_config_may_be_anywhere(tmp_path, monkeypatch):
    """A name with a colon, a bucket, the ready ones from another folder; what is no config says why."""
    text = "from configs import smoke\n\n\ndef get_config():\n    return smoke.get_config()\n"
    runs = tmp_path / "2026-11-26T10:15:00"
    runs.mkdir()
    (runs / "config.py").write_text(text)
    assert config_files.read(str(runs / "config.py"), []).targets.k == 16
    with monkeypatch.context() as bucket:
        bucket.setattr(storage, "prepare", lambda place: None)
        bucket.setattr(epath, "Path", lambda place: pathlib.Path(place.replace("gs://bucket", str(runs))))
        assert config_files.read("gs://bucket/config.py", []).targets.k == 16
    monkeypatch.chdir(tmp_path)
    assert config_files.read("configs/quickstart.py", []).targets.k == 64
    for content, message in (
        ("def get_config(:\n", r"broken.py: line 1: SyntaxError: "),
        ("import nothing_of_this_name", r"broken.py: cannot be run \(ModuleNotFoundError"),
        ("x = 1", r"broken.py: has no get_config\(\)"),
        ("def get_sweep(): pass", r"it is the config of a sweep: mlpmem sweep"),
        ("def get_config(): return 3", r"expected an ml_collections.ConfigDict, found int"),
    ):
        (tmp_path / "broken.py").write_text(content)
        with pytest.raises(ConfigError, match=message):
            config_files.read("broken.py", [])
    for place, message in (("nowhere.py", "no such file"), (str(runs), "is a folder"), ("broken.py/x", "no such file")):
        with pytest.raises(ConfigError, match=message):
            config_files.read(place, [])
