"""The stages on an imported Mistral: what they store is what the model says, and its memory has its family."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest

from configs import smoke
from mlpmem_jax import stages
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ArtifactError, ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.parameters import fingerprint as parameters_fingerprint
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream, read_sequences
from mlpmem_jax.inference import side_by_side
from mlpmem_jax.interop import huggingface
from mlpmem_jax.interop.base_model import check_fits
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.models.llama import LlamaConfig
from mlpmem_jax.models.rotary import Rotary
from mlpmem_jax.scaling import tasks
from mlpmem_jax.training import continued, controls, train_memory

MISTRAL = LlamaConfig(
    vocab_size=320,  # more than the tokenizer has, as where a vocabulary was padded
    context_length=64,
    width=16,
    blocks=3,
    heads=4,
    key_value_heads=2,
    head_width=6,
    feed_forward_width=24,
    norm_epsilon=3e-5,
    sliding_window=5,
    rotary=Rotary(theta=500.0),
    family="mistral",
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistral")
    parameters = jax.jit(language_model.init, static_argnums=0)(MISTRAL, jax.random.key(0))
    parameters = jax.tree.map(lambda array: 5 * array if array.ndim > 1 else array, parameters)
    huggingface.save_language_model(folder / "model", parameters, MISTRAL)

    config = smoke.get_config()
    config.workdir = str(folder / "run")
    config.corpus.max_bytes = 40_000
    config.tokenizer.vocab_size = 300
    config.base.update({"source": "huggingface", "path": str(folder / "model"), "context_length": 16})
    config.datastore.update({"sequences_per_shard": 200, "input_depth": 0.7})
    config.targets.update({"k": 4, "temperature": 3.0, "backend": "exact", "quality_positions": 16})
    config.memory.update(
        {"family": "llama", "width": 16, "blocks": 1, "feed_forward_width": 24, "output_from_base": True}
    )
    config.training.update({"mode": "online", "steps": 1, "warmup_steps": 0, "learning_rate": 0.0})
    config.training.update({"adam_learning_rate": 0.0, "evaluation_sequences": 8})
    for stage in ("tokens", "base", "datastore", "targets", "train"):
        stages.run(stage, config)
    return config


@pytest.fixture(scope="module")
def base(config):
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    parameters, model, artifact = saved.load_language_model(f"{config.workdir}/base", Sharding(mesh))
    assert model == MISTRAL
    assert artifact.summary["model"]["family"] == "mistral"
    return parameters


def test_the_datastore_holds_its_states_and_log_probabilities(config, base):
    datastore = open_artifact(f"{config.workdir}/datastore/test", "datastore")
    tokens = open_artifact(f"{config.workdir}/tokens", "tokens")
    tokens_SxT, next_SxT, _ = read_sequences(TokenStream(tokens, "test"), 0, 2, 16)
    final, block_inputs = language_model.features(base, MISTRAL, tokens_SxT, input_blocks=(2, 3))
    np.testing.assert_allclose(datastore.read("keys", 0, 2), block_inputs[3], atol=5e-3)
    np.testing.assert_allclose(datastore.read("memory_inputs", 0, 2), block_inputs[2], atol=5e-3)
    logits_SxTxV = np.asarray(final) @ np.asarray(base["lm_head"]["kernel"])
    log_SxTxV = jax.nn.log_softmax(logits_SxTxV)
    expected = np.take_along_axis(np.asarray(log_SxTxV), next_SxT[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(datastore.read("base_log_probabilities", 0, 2), expected, atol=1e-4)


def test_the_memory_has_the_family_of_its_base_and_starts_from_its_untied_output(config, base):
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    parameters, model, _ = saved.load_memory(f"{config.workdir}/memory", Sharding(mesh))
    assert (model.family, model.activation, model.norm_epsilon) == ("llama", "silu", 3e-5)
    assert model.feed_forward_width == 24
    kernel = parameters["lm_head"]["kernel"]
    np.testing.assert_array_equal(kernel[:, :300], base["lm_head"]["kernel"][:, :300])
    np.testing.assert_array_equal(kernel[:, 300:], 0)


PROMPTS = ["The", ""]


def test_it_generates_with_its_memory_and_the_lambda_of_its_report(config, capsys):
    side_by_side.run(config, PROMPTS, count=3)
    trained = open_artifact(f"{config.workdir}/memory", "memory")
    printed = capsys.readouterr().out
    assert "base LM + memory" in printed
    assert f"lambda {trained.summary['validation']['interpolation_weight']:.4f}: from {trained.path}" in printed

    config.evaluation.update({"sharpness_positions": 40})
    stages.run("evaluate", config)  # base and memory are padded to different sizes
    report = pathlib.Path(config.workdir) / "report" / "metrics.json"
    metrics = json.loads(report.read_text())
    assert metrics["sharpness"]["augmented"]["positions"] == 40
    metrics["interpolation_weight"]["memory"] = 0.4321
    report.write_text(json.dumps(metrics))
    side_by_side.run(config, PROMPTS, count=3)
    assert f"lambda 0.4321: from {report}, tuned on the validation split" in capsys.readouterr().out
    metrics["provenance"]["fingerprints"]["memory"] = "another"
    report.write_text(json.dumps(metrics))
    side_by_side.run(config, PROMPTS, count=3)
    assert "lambda 0.4321" not in capsys.readouterr().out


def test_generation_reads_the_block_that_the_memory_was_trained_on(config, monkeypatch):
    changed = config.copy_and_resolve_references()
    changed.datastore.input_depth = 1.0
    read = []
    monkeypatch.setattr(side_by_side, "generate", lambda models, *_, **__: read.append(models.input_block) or [])
    monkeypatch.setattr(side_by_side, "_show", lambda *_: None)
    side_by_side.run(changed, PROMPTS, count=3)
    assert read == [0, 2]  # alone, and beside the memory: depth 0.7 of three blocks


def test_training_refuses_a_datastore_of_another_depth(config):
    changed = config.copy_and_resolve_references()
    changed.datastore.input_depth = 1.0
    with pytest.raises(ConfigError, match=r"input_depth: 1.0 is not that of .*datastore/train.* block 2 of 3"):
        stages.run("train", changed)


def test_generation_refuses_a_memory_of_another_base(config, tmp_path):
    changed = config.copy_and_resolve_references()
    changed.workdir = str(tmp_path)
    for name in ("tokens", "memory"):
        (tmp_path / name).symlink_to(pathlib.Path(config.workdir) / name)
    changed.base.path = str(tmp_path / "model")
    parameters = jax.jit(language_model.init, static_argnums=0)(MISTRAL, jax.random.key(1))
    huggingface.save_language_model(tmp_path / "model", parameters, MISTRAL)
    stages.run("base", changed)
    with pytest.raises(ArtifactError, match=rf"/memory: was made from another base than .*{tmp_path}/base"):
        side_by_side.run(changed, PROMPTS, count=3)


@pytest.mark.parametrize(
    ("changes", "context_length", "message"),
    [
        ({"vocab_size": 299}, 16, "config.base.path=X: has a vocabulary of 299, but the tokenizer has ids up to 299"),
        ({"vocab_size": 400}, 16, "config.base.path=X: has a vocabulary of 400, but the tokenizer has ids up to 299"),
        ({"context_length": 15}, 16, "config.base.context_length: 16 is longer than the 15 positions of config.base"),
    ],
)
def test_a_model_that_cannot_read_the_tokens_is_refused(config, changes, context_length, message):
    tokens = open_artifact(f"{config.workdir}/tokens", "tokens")
    check_fits("X", MISTRAL, tokens, MISTRAL.context_length)
    with pytest.raises(ConfigError, match=message):
        check_fits("config.base.path=X", dataclasses.replace(MISTRAL, **changes), tokens, context_length)


@pytest.mark.slow
def test_a_base_that_was_imported_is_trained_on_at_the_best_of_small_rates(config):
    """Its control takes the settings of the memory's training and not those of a base that is trained here."""
    own = config.copy_and_resolve_references()
    own.training.update({"steps": 40, "learning_rate": 0.02, "evaluate_every": 40, "optimizer": "muon"})
    control = controls.continued(own)
    actual = control.summary
    assert actual["rate_search"].keys() == {"1e-05", "3e-05", "0.0001", "0.0003"}
    assert actual["rate_finals"].keys() == set(sorted(actual["rate_search"], key=actual["rate_search"].get)[:2])
    assert actual["rate_finals"][f"{actual['learning_rate']:g}"] == min(actual["rate_finals"].values())
    assert control.config["training"]["learning_rate"] == [1e-5, 3e-5, 1e-4, 3e-4]
    assert control.config["training"]["optimizer"] == "adamw"
    assert control.config["training"]["batch_sequences"] == config.training.batch_sequences
    trained = open_artifact(f"{config.workdir}/memory", "memory")
    assert actual["training_flops"] == pytest.approx(trained.summary["training_flops"], rel=0.5)
    searched = actual["steps"] + 4 * max(1, round(actual["steps"] / 8))
    assert actual["rate_search_flops"] == actual["training_flops"] * searched / actual["steps"]
    assert not pathlib.Path(control.path, "rates").exists()
    assert controls.continued(own).fingerprint == control.fingerprint  # and nothing is tried again
    assert not pathlib.Path(control.path, "rates").exists()


def test_a_sweep_continues_an_imported_base_at_the_best_of_small_rates(config, monkeypatch):
    monkeypatch.setattr(continued, "RATES", (0.001, 0.003))
    own = config.copy_and_resolve_references()
    own.training.update({"steps": 8, "learning_rate": 0.5, "evaluate_every": 8, "optimizer": "muon"})
    trained = continued.run(own)
    assert trained.summary["rate_search"].keys() == {"0.001", "0.003"}
    assert trained.summary["learning_rate"] in continued.RATES
    assert trained.config["training"]["optimizer"] == "adamw"
    task = tasks.SweepTask("of-mistral-continued", "continued", own, (), {}, 0.0)
    assert task.is_finished()
    own.base.context_length -= 1
    assert not task.is_finished()


def test_a_base_that_training_only_harms_is_its_own_control(config, base, monkeypatch):
    own = config.copy_and_resolve_references()
    own.training.update({"steps": 2, "warmup_steps": 0, "optimizer": "adamw", "learning_rate": 10.0})
    load, size = saved.load_language_model, sum(array.nbytes for array in jax.tree.leaves(base))
    others = sum(array.nbytes for array in jax.live_arrays())

    def load_alone(*arguments):
        held = sum(array.nbytes for array in jax.live_arrays()) - others
        assert held < size, "the trained parameters are still held"
        return load(*arguments)

    monkeypatch.setattr(saved, "load_language_model", load_alone)
    kept = continued.train_on(own, continued.settings_of(own), "harmed", {}, "training")
    assert kept.summary["step"] == 0
    mesh = make_mesh(1, 1, 1, jax.devices()[:1])
    parameters, _, _ = load(kept.path, Sharding(mesh))
    np.testing.assert_array_equal(parameters["lm_head"]["kernel"], base["lm_head"]["kernel"])


def test_an_imported_base_is_fine_tuned_before_its_keys_are_taken(config, base, tmp_path, monkeypatch):
    monkeypatch.setattr(continued, "RATES", (0.003,))
    own = config.copy_and_resolve_references()
    own.workdir = str(tmp_path)
    (tmp_path / "tokens").symlink_to(pathlib.Path(config.workdir) / "tokens")
    own.base.finetune_steps = 8
    own.base.training.update({"batch_sequences": 8, "evaluate_every": 8, "evaluation_sequences": 8, "warmup_steps": 50})
    stages.run("base", own)
    artifact = open_artifact(tmp_path / "base", "base")
    tokens, pretrained = (
        open_artifact(tmp_path / name, kind) for name, kind in (("tokens", "tokens"), ("pretrained", "base"))
    )
    assert artifact.inputs == {"pretrained": pretrained.fingerprint, "tokens": tokens.fingerprint}
    assert pretrained.summary["parameters_fingerprint"] == parameters_fingerprint(base)
    actual = artifact.summary
    assert actual["rate_search"].keys() == {"0.003"}
    assert (actual["learning_rate"], actual["steps"]) == (0.003, 8)
    stream = TokenStream(tokens, "validation")
    before, after = (
        continued._perplexity(own, parameters, MISTRAL, stream, sharding, "base")
        for sharding in [Sharding(make_mesh(1, 1, 1, jax.devices()[:1]))]
        for parameters in (base, saved.load_language_model(artifact.path, sharding)[0])
    )
    assert actual["perplexity"]["validation"] == pytest.approx(after)
    own.datastore.compute_dtype = "bfloat16"  # in which base and memory are then scored
    one_device = Sharding(make_mesh(1, 1, 1, jax.devices()[:1]))
    rounded = continued._perplexity(own, base, MISTRAL, stream, one_device, "base")
    assert rounded != before == pytest.approx(rounded, rel=0.01)
    own.datastore.compute_dtype = "float32"
    assert after < 0.9 * before
    monkeypatch.setattr(continued.train_base, "train", lambda *_, **__: pytest.fail("trained again"))
    stages.run("base", own)
    for key, value, changed in (
        ("finetune_steps", 9, "training.steps: 8"),
        ("context_length", 12, "context_length: 16"),
    ):
        other = own.copy_and_resolve_references()
        other.base[key] = value
        with pytest.raises(ArtifactError, match=rf"config.{changed} there, {value} now"):
            stages.run("base", other)


def test_what_saves_memory_or_time_may_change_when_a_training_resumes(config):
    own = config.copy_and_resolve_references()
    own.training.update({"remat": True, "loss_chunk": 64, "accumulation_steps": 2})
    own.training.update({"checkpoint_every": 7, "evaluate_every": 9})
    trained = open_artifact(f"{config.workdir}/memory", "memory")
    assert train_memory.run(own).fingerprint == trained.fingerprint
    own.training.alpha = 0.7
    with pytest.raises(ArtifactError, match=r"training.alpha: 0.4 there, 0.7 now"):
        train_memory.run(own)
