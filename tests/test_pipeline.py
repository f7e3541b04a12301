"""All stages in one process on a small corpus, held against brute force from the equations of the paper."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from workdirs import small_config

from mlpmem_jax import stages
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ArtifactError, ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.inference import trained_benchmark
from mlpmem_jax.models import language_model, saved
from mlpmem_jax.training import controls, data, train_memory

NEIGHBORS = 5


def small(workdir):
    config = small_config(workdir, steps=20, every=10, blocks=3, evaluation__sharpness_positions=100)
    config.datastore.update({"sequences_per_shard": 100, "input_depth": 0.7})
    config.targets.update({"k": NEIGHBORS, "temperature": 3.0, "backend": "exact", "quality_positions": 64})
    return config


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline") / "run"
    config = small(folder)
    for stage in stages.STAGES:
        if stage != "evaluate":  # once, with the controls
            stages.run(stage, config)
    return folder


def opened(workdir, split):
    datastore = open_artifact(workdir / "datastore" / split, "datastore")
    targets = open_artifact(workdir / "targets" / split, "targets")
    sequences, length = datastore.arrays["next_tokens"].shape
    return datastore, targets, sequences, length


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_values_are_the_corpus_shifted_by_one(workdir, split):
    """Position t's value is token t + 1, and its key is a function of tokens up to t alone."""
    datastore, _, sequences, length = opened(workdir, split)
    stream = TokenStream(open_artifact(workdir / "tokens", "tokens"), split)
    tokens = stream.read(0, sequences * length + 1)
    following = datastore.read("next_tokens", 0, sequences).reshape(-1)
    np.testing.assert_array_equal(following, tokens[1:])
    assert not np.array_equal(following, tokens[:-1])

    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    base, model, _ = saved.load_language_model(workdir / "base", Sharding(mesh))
    changed = tokens[:length].copy()
    changed[9:] = (changed[9:] + 1) % model.vocab_size  # only what comes after position 8 differs
    _, block_inputs = language_model.features(base, model, jnp.asarray(changed)[None], input_blocks=(2, 3))
    keys, inputs = (datastore.read(name, 0, 1)[0].astype(np.float32) for name in ("keys", "memory_inputs"))
    for stored, block in ((keys, 3), (inputs, 2)):  # depth 0.7 of three blocks is block 2
        np.testing.assert_allclose(stored[:9], block_inputs[block][0, :9], atol=5e-3)
        assert np.abs(stored[9:] - block_inputs[block][0, 9:]).max() > 0.05


def brute_force(workdir, split, positions):
    """p_kNN of some positions, float64 [positions, V], written from the paper's equations, and which are unambiguous.

    A position is ambiguous when its last neighbor and the next one are equally far.
    """
    train, _, count, length = opened(workdir, "train")
    keys = train.read("keys", 0, count).reshape(count * length, -1).astype(np.float64)
    values = train.read("next_tokens", 0, count).reshape(-1)
    datastore, _, sequences, _ = opened(workdir, split)
    queries = datastore.read("keys", 0, sequences).reshape(sequences * length, -1).astype(np.float64)[positions]
    distances = ((queries[:, None] - keys[None]) ** 2).sum(-1)
    if split == "train":
        distances[np.arange(len(positions)), positions] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")
    ranked = np.take_along_axis(distances, order, axis=1)
    clear = ranked[:, NEIGHBORS] - ranked[:, NEIGHBORS - 1] > 1e-4
    nearest = order[:, :NEIGHBORS]
    result = np.zeros((len(positions), 300))
    for row, actual in enumerate(nearest):
        weights = np.exp(-(distances[row, actual] - distances[row, actual].min()) / 3.0)
        np.add.at(result[row], values[actual], weights / weights.sum())
    return result, clear


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_targets_are_p_knn(workdir, split):
    datastore, targets, sequences, length = opened(workdir, split)
    positions = np.random.default_rng(0).choice(sequences * length, 200, replace=False)
    expected, clear = brute_force(workdir, split, positions)
    assert clear.sum() > 40
    positions, expected = positions[clear], expected[clear]
    labels = datastore.read("next_tokens", 0, sequences).reshape(-1)[positions]
    actual = targets.read("label_probabilities", 0, sequences).reshape(-1)[positions]
    np.testing.assert_allclose(actual, expected[np.arange(len(positions)), labels], atol=2e-4)

    source = data.TargetSource(datastore, targets)
    batch = source[positions // length]
    assert batch["token_ids"].dtype == np.uint16  # as stored: half the bytes of int32 and float32
    for index, (place, row) in enumerate(zip(positions % length, expected, strict=True)):
        dense = np.zeros(300)
        np.add.at(dense, batch["token_ids"][index, place], batch["probabilities"][index, place])
        np.testing.assert_allclose(dense, row, atol=1e-3)


def test_online_training_sees_what_offline_training_sees(workdir):
    """The base LM inside the step gives the losses that the stored memory inputs give, but for float16."""
    losses, summaries = {}, {}
    for mode in ("offline", "online"):
        config = small(workdir)
        config.training.mode = mode
        summaries[mode] = train_memory.train(config, mode).summary
        lines = [json.loads(line) for line in (workdir / mode / "metrics.jsonl").read_text().splitlines()]
        losses[mode] = [line["loss"] for line in lines if "loss" in line]
    np.testing.assert_allclose(losses["online"], losses["offline"], rtol=2e-3)
    # What `continued` is given to match includes the base's forward passes.
    base = saved.language_model_config(open_artifact(workdir / "base", "base"))
    forward = language_model.forward_flops(base, config.base.context_length, output_projection=False)
    more = summaries["online"]["training_flops"] - summaries["offline"]["training_flops"]
    assert more == pytest.approx(forward * summaries["online"]["positions"])


@pytest.mark.slow
def test_generation_of_the_trained_models_is_measured(workdir):
    rows = trained_benchmark.rows(small(workdir))
    assert [row["name"].rpartition(", ")[2] for row in rows] == ["base alone", "memory in every step", "with drafts"]
    assert all(row["value"] > 0 for row in rows)
    assert re.search(r"for \d+ tokens \d+ steps of the base and \d+ passes of the memory", rows[2]["detail"])


def test_report_has_every_promised_figure(workdir):
    config = small(workdir)
    controls.run(config)
    assert config == small(workdir)  # the report's config is that of the memory, not of a control
    stages.run("evaluate", config)
    metrics = json.loads((workdir / "report" / "metrics.json").read_text())
    for split in ("validation", "test"):
        assert set(metrics["perplexity"][split]) >= {"base", "memory", "knn_lm", "augmented"}
        assert split in metrics["gain_kept"]
    assert set(metrics["interpolation_weight"]) >= {"memory", "knn_lm"}
    low, high = metrics["interval"]["test"]["augmented_over_base"]
    assert low <= metrics["perplexity"]["test"]["augmented"] / metrics["perplexity"]["test"]["base"] <= high
    assert set(metrics["targets"]) >= {"recall_at_k", "total_variation", "bytes_per_position"}
    assert set(metrics["controls"]) == {"continued", "ce_only"}
    assert set(stages.STAGES) <= set(metrics["seconds"])
    assert set(stages.STAGES) <= set(metrics["peak_rss_bytes"])
    assert metrics["bytes"]["targets/train"] > 0
    assert "<html" in (workdir / "report" / "index.html").read_text()


def test_a_stage_without_its_input_says_which_stage_is_missing(tmp_path):
    for stage in list(stages.STAGES)[1:]:
        with pytest.raises(ArtifactError, match="run the stage that builds it"):
            stages.run(stage, small(tmp_path / stage))


def test_another_config_does_not_touch_a_finished_workdir(workdir):
    config = small(workdir)
    config.targets.k = NEIGHBORS + 1
    before = (workdir / "targets" / "train" / "manifest.json").read_bytes()
    with pytest.raises(ArtifactError, match=r"config.k: 5 there, 6 now"):
        stages.run("targets", config)
    assert (workdir / "targets" / "train" / "manifest.json").read_bytes() == before


def test_sizes_that_do_not_divide_the_mesh_are_refused(workdir, tmp_path):
    config = small(workdir)
    config.datastore.batch_sequences = 12
    with pytest.raises(ConfigError, match=r"config.datastore.batch_sequences: 12 is not a multiple of the 8"):
        stages.run("datastore", config)
