"""Training and evaluation continue from what was imported: base, memory, datastores and targets."""

import jax
import numpy as np
import pytest
from etils import epath
from interop_data import (
    GPT2,
    LENGTH,
    MODELS,
    TARGETS,
    VOCABULARY,
    WIDTH,
    config_for,
    datastore_stream,
    keys_of,
    target_columns,
    write_stream,
    write_tokens,
    write_workdir,
)

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.evaluation import evaluate
from mlpmem_jax.interop import arrow_import, base_model, export_model, import_model
from mlpmem_jax.models import memory, saved
from mlpmem_jax.training import continued, controls, train_memory


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """(config, parameters of the memory, next tokens of the test split) of a directory where all is imported."""
    root = tmp_path_factory.mktemp("resumed")
    models = write_workdir(root / "source", *MODELS["gpt2-projected"], input_block=GPT2.blocks)
    folder = export_model.transformers_folder(models.config, str(root / "folder"))
    streams = write_tokens(epath.Path(root / "work"))
    config = config_for(
        root / "work",
        datastore__input_depth=1.0,
        targets__k=8,
        memory__width=24,
        memory__blocks=2,
        training__steps=2,
        training__batch_sequences=8,
        training__learning_rate=0.0,
        training__adam_learning_rate=0.0,
        training__warmup_steps=1,
        evaluation__sharpness_positions=40,
    )
    import_model.run(config, str(folder))
    for split, tokens in streams.items():
        following = tokens[1:]
        arrow_import.run(config, split, datastore_stream(root / "d.arrow", following, keys_of(len(following))))
        columns = target_columns(following[: len(following) // LENGTH * LENGTH])
        arrow_import.run(config, split, write_stream(root / f"{split}.arrow", TARGETS, columns))
    return config, models.memory, streams["test"][1:]


def test_stages_take_what_was_imported_as_finished(imported):
    config, _, _ = imported
    workdir = epath.Path(config.workdir)
    before = {name: (workdir / name / "manifest.json").read_text() for name in ("base", "memory")}
    assert base_model.run(config).summary["model"]["width"] == GPT2.width
    assert train_memory.run(config).config["imported"]
    assert before == {name: (workdir / name / "manifest.json").read_text() for name in before}


def test_training_starts_from_an_imported_memory(imported):
    config, parameters, _ = imported
    config = config.copy_and_resolve_references()
    config.training.start = str(epath.Path(config.workdir) / "memory")
    artifact = train_memory.train(config, "trained_on")
    actual, _, _ = saved.load_memory(artifact.path, Sharding.of(config))
    jax.tree.map(np.testing.assert_array_equal, actual, parameters)  # the learning rate is 0
    assert artifact.inputs["start"]
    base = open_artifact(epath.Path(config.workdir) / "base", "base")
    with pytest.raises(UserError, match="trained_on: was started from an imported one, so its training cost"):
        continued.flops_of_memory(artifact, base)
    with pytest.raises(ConfigError, match=r"training\.start: controls/ce_only would start from .*memory"):
        controls.ce_only(config)
    config.memory.width = 32
    with pytest.raises(ConfigError, match=r"config\.training\.start: .* has width 24, the config asks for 32"):
        train_memory.train(config, "wider")


def test_training_from_another_memory_costs_what_both_did(imported):
    config = imported[0].copy_and_resolve_references()
    config.training.update({"steps": 2, "warmup_steps": 0})
    first = train_memory.train(config, "first")
    config.training.update({"steps": 3, "start": first.path})
    second = train_memory.train(config, "second")
    assert second.summary["training_flops"] == pytest.approx(2.5 * first.summary["training_flops"])


def test_the_control_of_an_imported_base_takes_the_settings_of_the_memory(imported, tmp_path):
    """And none of `base.training`, with which no model was trained here."""
    workdir = epath.Path(imported[0].workdir)
    config = imported[0].copy_and_resolve_references()
    config.training.update({"steps": 1, "warmup_steps": 0, "seed": 5})
    train_memory.train(config, "own")
    for name, entry in {"base": "base", "tokens": "tokens", "memory": "own"}.items():
        (tmp_path / name).symlink_to(workdir / entry)
    config.workdir = str(tmp_path)
    actual = controls.continued(config).config["training"]
    assert (actual["optimizer"], actual["seed"]) == ("adamw", 6)
    assert actual["learning_rate"] == [1e-5, 3e-5, 1e-4, 3e-4]


def test_evaluation_scores_an_imported_memory(imported):
    config, parameters, following = imported
    metrics = evaluate.run(config)
    count = len(following) // LENGTH * LENGTH
    inputs = keys_of(len(following))[:count].astype(np.float32)
    logits = np.asarray(memory.logits(parameters, MODELS["gpt2-projected"][1], inputs), np.float64)[:, :VOCABULARY]
    assert inputs.shape[1] == WIDTH
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= logits.max(-1, keepdims=True)
    scores = log_p[np.arange(count), following[:count]]
    assert metrics["perplexity"]["test"]["memory"] == pytest.approx(np.exp(-scores.mean()), rel=1e-4)
    assert metrics["targets"]["backend"] == "imported"
