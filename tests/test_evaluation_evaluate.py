"""The stage `evaluate` on small artifacts made by hand, against NumPy on the models' logits."""

import errno
import json
import shutil

import jax
import numpy as np
import pytest
from workdirs import write_datastore

from configs import default
from mlpmem_jax.core import manifests
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter, open_artifact
from mlpmem_jax.core.errors import ArtifactError, ConfigError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.evaluation import evaluate, provenance, report
from mlpmem_jax.evaluation.inputs import open_inputs
from mlpmem_jax.models import gpt2, language_model, memory, saved, scoring

VOCABULARY, LENGTH, ENTRIES = 31, 8, 12
LANGUAGE_MODEL = gpt2.GPT2Config(VOCABULARY, LENGTH, 16, 2, 2)
MEMORY = memory.MemoryConfig("gpt2", VOCABULARY, 32, 16, 16, 2, 32)
SEQUENCES = {"train": 3, "validation": 7, "test": 9}
PER_SHARD = 4
SETTINGS = {"memory": {"blocks": 2}, "training": {"alpha": 0.4, "seed": 0}}


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def write_tokens(workdir, streams):
    arrays = {}
    for name in ("train", "validation", "test"):
        arrays[name] = ArraySpec((1, 4096), "uint16", 1, (1, 4096))
        arrays[f"{name}_lengths"] = ArraySpec((1, 4096), "uint32", 1, (1, 4096))
    writer = ArtifactWriter.create(workdir / "tokens", "tokens", {}, {}, arrays)
    rows = {name: stream[None] for name, stream in streams.items()}
    writer.write_shard(0, {**rows, **{f"{name}_lengths": [[len(stream)]] for name, stream in streams.items()}})
    return writer.seal({"vocab_size": VOCABULARY})


def write_model(path, kind, model, parameters, inputs, config=None, **figures):
    writer = ArtifactWriter.create(path, kind, config or {}, inputs, {})
    return saved.seal(writer, model, parameters, {"step": 10, "steps": 20, "training_flops": 1e6, **figures})


def write_split(workdir, split, inputs_SxTxD, next_SxT, scores_SxT, inputs):
    documents_N = np.arange(next_SxT.size) // (2 * LENGTH)
    arrays = {
        "keys": np.asarray(inputs_SxTxD, np.float16),
        "next_tokens": np.asarray(next_SxT, np.int32),
        "documents": documents_N.reshape(next_SxT.shape).astype(np.int32),
        "base_log_probabilities": np.asarray(scores_SxT, np.float32),
    }
    return write_datastore(workdir / "datastore" / split, arrays, inputs=inputs, summary={"input_block": 2})


def write_targets(workdir, split, counts_SxT, labels_SxT, inputs):
    """Every position has uniform probabilities over so many tokens."""
    count = len(counts_SxT)
    shards = -(-count // PER_SHARD)
    capacity = PER_SHARD * LENGTH * ENTRIES
    specs = {
        "offsets": ArraySpec((count, LENGTH + 1), "int32", PER_SHARD, (1, LENGTH + 1)),
        "token_ids": ArraySpec((shards, capacity), "uint16", 1, (1, capacity)),
        "probabilities": ArraySpec((shards, capacity), "float16", 1, (1, capacity)),
        "label_probabilities": ArraySpec((count, LENGTH), "float32", PER_SHARD, (1, LENGTH)),
    }
    writer = ArtifactWriter.create(workdir / "targets" / split, "targets", {}, inputs, specs)
    for shard in range(shards):
        part = slice(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        counts_N = counts_SxT[part].ravel()
        ends_N1 = np.concatenate([[0], np.cumsum(counts_N)])
        starts_S = ends_N1[:-1].reshape(-1, LENGTH)[:, :1]
        writer.write_shard(
            shard,
            {
                "offsets": np.concatenate([starts_S, ends_N1[1:].reshape(-1, LENGTH)], axis=1),
                "token_ids": np.zeros((1, counts_N.sum())),
                "probabilities": np.repeat(1.0 / counts_N, counts_N)[None],
                "label_probabilities": labels_SxT[part],
            },
        )
    return writer.seal({"recall_at_k": 0.99, "total_variation": 0.001, "bytes_per_position": 12.5})


@jax.jit
def fresh_models(key):
    """Parameters of a language model and of a memory, far from uniform."""
    parameters = gpt2.init(LANGUAGE_MODEL, key), memory.init(MEMORY, key)
    return jax.tree.map(lambda array: array * 6.0, parameters)


@pytest.fixture(autouse=True, scope="module")
def one_device():
    """Sharded scoring has tests of its own; here one device compiles faster."""
    with pytest.MonkeyPatch.context() as patch:
        sharding = Sharding(make_mesh(1, 1, 1, devices=jax.devices()[:1]))
        patch.setattr(Sharding, "of", lambda config: sharding)
        yield


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A working directory of finished stages, and what an independent computation says about it."""
    workdir = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    base, trained = fresh_models(jax.random.key(0))
    streams = {split: generator.integers(VOCABULARY, size=n * LENGTH + 3) for split, n in SEQUENCES.items()}
    inputs = {"tokens": write_tokens(workdir, streams).fingerprint}
    inputs["base"] = write_model(workdir / "base", "base", LANGUAGE_MODEL, base, inputs).fingerprint
    expected, datastores = {}, {}
    for split, count in SEQUENCES.items():
        tokens_SxT = streams[split][: count * LENGTH].reshape(count, LENGTH)
        next_SxT = streams[split][1 : count * LENGTH + 1].reshape(count, LENGTH)
        base_SxTxV = log_softmax(language_model.logits(base, LANGUAGE_MODEL, tokens_SxT))
        inputs_SxTxD = generator.normal(size=(count, LENGTH, 16)).astype(np.float16)
        logits_SxTxV = memory.logits(trained, MEMORY, inputs_SxTxD.astype(np.float32))
        memory_SxTxV = log_softmax(np.asarray(logits_SxTxV)[..., :VOCABULARY])
        picked = [np.take_along_axis(rows, next_SxT[..., None], 2)[..., 0] for rows in (base_SxTxV, memory_SxTxV)]
        labels_SxT = generator.random((count, LENGTH)) * (generator.random((count, LENGTH)) < 0.5)
        counts_SxT = generator.integers(1, ENTRIES + 1, (count, LENGTH))
        written = write_split(workdir, split, inputs_SxTxD, next_SxT, picked[0], inputs)
        datastores[f"datastore/{split}"] = written.fingerprint
        expected[split] = {
            "base": picked[0],
            "memory": picked[1],
            "labels": labels_SxT,
            "rows": {"base": base_SxTxV, "memory": memory_SxTxV},
            "counts": counts_SxT,
        }
    targets = [write_targets(workdir, split, of["counts"], of["labels"], datastores) for split, of in expected.items()]
    made_from = {"base": inputs["base"], "datastore": datastores["datastore/train"], "targets": targets[0].fingerprint}
    write_model(workdir / "memory", "memory", MEMORY, trained, made_from, SETTINGS, input_block=2)
    return workdir, expected


def config_of(workdir):
    config = default.get_config()
    config.workdir = str(workdir)
    config.evaluation.sharpness_positions = 10_000
    return config


def perplexity(probabilities):
    return np.exp(-np.mean(np.log(probabilities)))


@pytest.fixture(scope="module")
def metrics(world):
    """What the stage says about it."""
    workdir, _ = world
    (workdir / "stages.jsonl").write_text(
        "".join(json.dumps({"stage": "tokens", "seconds": s, "peak_rss_bytes": b}) + "\n" for s, b in ((1, 9), (2, 5)))
    )
    with pytest.MonkeyPatch.context() as patch:
        # Several chunks of everything, the last ones short.
        patch.setattr(evaluate, "_PROBABILITIES_AT_ONCE", 13 * VOCABULARY)
        patch.setattr(scoring, "POSITIONS_AT_ONCE", 3 * LENGTH)
        return evaluate.run(config_of(workdir))


def test_the_stage_agrees_with_numpy_on_the_logits(world, metrics):
    workdir, expected = world
    assert json.loads((workdir / "report" / "metrics.json").read_text()) == json.loads(json.dumps(metrics))
    weights = metrics["interpolation_weight"]
    for split in ("validation", "test"):
        of, actual = expected[split], metrics["perplexity"][split]
        base_SxT, memory_SxT = np.exp(of["base"]), np.exp(of["memory"])
        assert actual["base"] == pytest.approx(perplexity(base_SxT), rel=1e-4)
        assert actual["memory"] == pytest.approx(perplexity(memory_SxT), rel=1e-4)
        for name, weight, other_SxT in (
            ("augmented", weights["memory"], memory_SxT),
            ("knn_lm", weights["knn_lm"], of["labels"]),
        ):
            assert actual[name] == pytest.approx(perplexity(weight * other_SxT + (1 - weight) * base_SxT), rel=1e-4)
            if split == "validation":
                grid = [perplexity(w * other_SxT + (1 - w) * base_SxT) for w in np.linspace(0, 0.99, 100)]
                assert actual[name] <= min(grid) * (1 + 1e-6)
    assert metrics["seconds"]["tokens"] == 3
    assert metrics["peak_rss_bytes"]["tokens"] == 9
    assert metrics["seconds"]["evaluate"] > 0
    assert metrics["bytes"]["memory"] > 4 * metrics["counts"]["parameters"]["memory"] / 2
    assert metrics["counts"]["tokens"] == {split: n * LENGTH for split, n in SEQUENCES.items()}
    assert metrics["targets"]["recall_at_k"] == 0.99
    assert metrics["interval"]["cluster"] == "document"
    assert metrics["interval"]["clusters"] == -(-SEQUENCES["test"] // 2)
    assert metrics["compute_dtype"] == "float32"


def test_shapes_are_means_over_all_positions_when_all_are_asked_for(world, metrics):
    shapes, of = metrics["sharpness"], world[1]["test"]
    assert {shape["positions"] for shape in shapes.values()} == {SEQUENCES["test"] * LENGTH}
    # Uniform over n tokens, 12 at most: n above zero, n above 0.1 if n < 10, and 0.8 n, rounded up, for 80 %.
    counts_SxT = of["counts"]
    assert shapes["knn"]["tokens_above"]["0"] == pytest.approx(counts_SxT.mean())
    assert shapes["knn"]["tokens_above"]["0.1"] == pytest.approx((counts_SxT * (counts_SxT < 10)).mean())
    assert shapes["knn"]["tokens_for_mass"]["0.8"] == pytest.approx(np.ceil(0.8 * counts_SxT - 1e-9).mean())
    for name in ("base", "memory"):
        rows_NxV = np.exp(of["rows"][name]).reshape(-1, VOCABULARY)
        assert shapes[name]["tokens_above"]["0.01"] == pytest.approx((rows_NxV > 0.01).sum(axis=1).mean(), abs=0.03)
        held_NxV = np.cumsum(-np.sort(-rows_NxV), axis=1)
        needed = 1 + (held_NxV < 0.9).sum(axis=1).mean()
        assert shapes[name]["tokens_for_mass"]["0.9"] == pytest.approx(needed, abs=0.03)


def test_the_breakdown_agrees_with_counts_and_entropies_of_the_streams(world, metrics):
    """Every test position is in a bin of its next token's count, of its context's count, and of the base's entropy."""
    workdir, of = world[0], world[1]["test"]
    tokens = open_artifact(workdir / "tokens", "tokens")
    training, test = ([*TokenStream(tokens, split).read(0, SEQUENCES[split] * LENGTH)] for split in ("train", "test"))
    training += [*TokenStream(tokens, "train").read(len(training), len(training) + 3)]
    following = [*test[1:], TokenStream(tokens, "test").read(len(test), len(test) + 1)[0]]
    weight = metrics["interpolation_weight"]["memory"]
    mixed_SxT = weight * np.exp(of["memory"]) + (1 - weight) * np.exp(of["base"])
    gains = (np.log(mixed_SxT) - of["base"]).ravel()
    grams = [tuple(training[at : at + 4]) for at in range(len(training) - 3)]
    values = {
        "token_count": [training.count(token) for token in following],
        "context_count": [None] * 3 + [grams.count(tuple(test[at - 3 : at + 1])) for at in range(3, len(test))],
        "base_entropy": -(np.exp(of["rows"]["base"]) * of["rows"]["base"]).sum(-1).ravel(),
    }
    for name, of_positions in values.items():
        rows = metrics["breakdown"][name]
        assert sum(row["positions"] for row in rows) == len(test) - 3 * (name == "context_count")
        for row in rows:
            upper = np.inf if row["below"] is None else row["below"]
            chosen = [at for at, value in enumerate(of_positions) if value is not None and row["from"] <= value < upper]
            assert len(chosen) == row["positions"]
            assert row["gain"]["augmented"] == pytest.approx(gains[chosen].mean(), abs=1e-4)
    assert metrics["breakdown"]["counted_tokens"] == len(training)


def test_a_report_that_cannot_be_written_again_stays(world, metrics, monkeypatch):
    def refused(folder, _):
        raise OSError(errno.EROFS, "Read-only file system", str(folder))

    monkeypatch.setattr(report, "write", refused)
    config = config_of(world[0])
    assert evaluate.run(config)["perplexity"] == metrics["perplexity"]
    config.evaluation.confidence = 0.5
    with pytest.raises(OSError, match="Read-only"):
        evaluate.run(config)


def linked(workdir, folder, *, without):
    """A working directory of links to the entries of another."""
    for entry in workdir.iterdir():
        if entry.name not in without:
            (folder / entry.name).symlink_to(entry)
    return folder


def controls_of(workdir):
    """Writers of the two controls of the memory of a working directory, by name, and their parameters."""
    of_memory = open_artifact(workdir / "memory", "memory")
    models = dict(zip(("continued", "ce_only"), fresh_models(jax.random.key(7)), strict=True))
    dimensions = {"continued": ("base", LANGUAGE_MODEL), "ce_only": ("memory", MEMORY)}
    inputs = {"continued": {"memory": of_memory.fingerprint}, "ce_only": of_memory.inputs}

    def write(folder, name, config=None, inputs=inputs, **figures):
        kind, model = dimensions[name]
        return write_model(folder / "controls" / name, kind, model, models[name], inputs[name], config, **figures)

    return write, models


def test_controls_of_this_memory_are_scored(world, tmp_path):
    workdir = linked(world[0], tmp_path, without=("report", "controls"))
    write, models = controls_of(workdir)
    write(workdir, "continued", training_flops=1.015e6)
    write(workdir, "ce_only", {**SETTINGS, "training": {**SETTINGS["training"], "alpha": 0.0}})
    metrics = evaluate.run(config_of(workdir))
    assert set(metrics["controls"]) == {"continued", "ce_only"}
    assert metrics["controls_left_out"] == {}
    opened = open_inputs(config_of(workdir))
    tokens_SxT, next_SxT = opened.tokens("test", 0, SEQUENCES["test"])
    rows_SxTxV = log_softmax(language_model.logits(models["continued"], LANGUAGE_MODEL, tokens_SxT))
    picked_SxT = np.take_along_axis(rows_SxTxV, next_SxT[..., None], 2)[..., 0]
    actual = metrics["controls"]["continued"]["perplexity"]["test"]
    assert actual == pytest.approx(perplexity(np.exp(picked_SxT)), rel=1e-4)
    inputs_SxTxD = opened.memory_inputs("test", 0, SEQUENCES["test"]).astype(np.float32)
    rows_SxTxV = log_softmax(np.asarray(memory.logits(models["ce_only"], MEMORY, inputs_SxTxD))[..., :VOCABULARY])
    picked_SxT = np.take_along_axis(rows_SxTxV, next_SxT[..., None], 2)[..., 0]
    weight = metrics["interpolation_weight"]["ce_only"]
    mixed_SxT = weight * np.exp(picked_SxT) + (1 - weight) * np.exp(world[1]["test"]["base"])
    actual = metrics["controls"]["ce_only"]["perplexity"]["test"]
    assert actual == pytest.approx(perplexity(mixed_SxT), rel=1e-4)
    assert "controls/continued" in metrics["bytes"]


def test_all_that_is_compared_is_computed_in_the_dtype_of_the_base_scores(world, tmp_path, monkeypatch):
    workdir = linked(world[0], tmp_path, without=("report", "controls"))
    write, _ = controls_of(workdir)
    write(workdir, "continued", training_flops=1.015e6)
    write(workdir, "ce_only", {**SETTINGS, "training": {**SETTINGS["training"], "alpha": 0.0}})
    opened = open_inputs(config_of(workdir))
    opened.artifacts["datastore/test"].config["compute_dtype"] = "bfloat16"
    dtypes = []

    def scored(parameters, model, inputs, next_tokens, *, sharding, compute_dtype):
        dtypes.append(compute_dtype)
        return np.zeros(np.shape(next_tokens), np.float32)

    for name in ("memory_log_probabilities", "language_model_log_probabilities"):
        monkeypatch.setattr(scoring, name, scored)
    evaluate._scores(opened, "test", {}, MEMORY)
    assert set(dtypes) == {"bfloat16"}
    assert len(dtypes) >= 3


ALPHA_0 = {"memory": {"blocks": 2}, "training": {"alpha": 0.0, "seed": 0}}


@pytest.mark.parametrize(
    ("name", "config", "inputs", "figures", "reason"),
    [
        ("continued", None, {"memory": "another"}, {}, "another memory"),
        ("continued", None, None, {"training_flops": 0.13e6}, "0.13 times"),
        ("continued", None, None, {"training_flops": 1.03e6}, "1.03 times"),
        ("ce_only", ALPHA_0, {"base": "another"}, {}, "settings or inputs"),
        ("ce_only", {**ALPHA_0, "memory": {"blocks": 1}}, None, {}, "different settings"),
        ("ce_only", SETTINGS, None, {}, "different settings"),
        ("ce_only", ALPHA_0, None, {"steps": 21}, "21 steps, the memory for 20"),
    ],
)
def test_controls_of_other_settings_are_named_and_left_out(world, tmp_path, name, config, inputs, figures, reason):
    workdir = linked(world[0], tmp_path, without=("report", "controls"))
    write, _ = controls_of(workdir)
    write(workdir, name, config, **({"inputs": {name: inputs}} if inputs else {}), **figures)
    opened = open_inputs(config_of(workdir))
    assert opened.controls == {}
    assert reason in opened.controls_left_out[name]
    assert str(workdir / "controls" / name) in opened.controls_left_out[name]


def test_whole_steps_may_miss_the_compute_by_half_of_one(world, tmp_path):
    workdir = linked(world[0], tmp_path, without=("report", "controls"))
    controls_of(workdir)[0](workdir, "continued", training_flops=1.2e6, steps=3)
    assert set(open_inputs(config_of(workdir)).controls) == {"continued"}


@pytest.mark.parametrize("remade", ["tokens", "base", "datastore/train", "datastore/test", "targets/train"])
def test_inputs_that_were_made_anew_since_are_refused(world, tmp_path, remade):
    """Both folders are named, and nothing is written."""
    workdir = linked(world[0], tmp_path, without=("report", "controls", remade.split("/")[0]))
    folder = world[0] / remade.split("/")[0]
    shutil.copytree(folder, workdir / folder.name)
    file = workdir / remade / "manifest.json"
    manifest = json.loads(file.read_text())
    manifest["summary"]["remade"] = True
    file.write_bytes(manifests.encode({**manifest, "fingerprint": manifests.fingerprint(manifest)}))
    with pytest.raises(ArtifactError, match=rf"/\S+: was made from another \w+ than the one at {workdir / remade}"):
        evaluate.run(config_of(workdir))
    assert not (workdir / "report").exists()


def test_a_memory_imported_for_another_block_is_refused(world, tmp_path):
    workdir = linked(world[0], tmp_path, without=("memory", "report"))
    base = open_artifact(workdir / "base", "base").fingerprint
    trained = fresh_models(jax.random.key(0))[1]
    origin = {"imported": {"parameters": "x"}}
    write_model(workdir / "memory", "memory", MEMORY, trained, {"base": base}, origin, input_block=1)
    with pytest.raises(ArtifactError, match=r"reads block 1 .* inputs of block 2; .*input_depth to 0.5"):
        evaluate.run(config_of(workdir))


def test_a_missing_stage_and_a_short_test_split_are_refused(world, tmp_path):
    with pytest.raises(ArtifactError, match="run the stage"):
        evaluate.run(config_of(tmp_path))
    workdir = linked(world[0], tmp_path, without=("datastore", "targets", "memory"))
    inputs = {kind: open_artifact(workdir / kind, kind).fingerprint for kind in ("tokens", "base")}
    datastores = {}
    for split, count in {**SEQUENCES, "test": 1}.items():
        zeros = [np.zeros((count, LENGTH, *width)) for width in ((16,), (), ())]
        datastores[f"datastore/{split}"] = write_split(workdir, split, *zeros, inputs).fingerprint
    for split in SEQUENCES:
        ones = np.ones((SEQUENCES[split], LENGTH), int)
        targets = write_targets(workdir, split, ones, ones, datastores)
        if split == "train":
            made_from = {"datastore": datastores["datastore/train"], "targets": targets.fingerprint}
    trained = fresh_models(jax.random.key(0))[1]
    write_model(workdir / "memory", "memory", MEMORY, trained, {"base": inputs["base"], **made_from})
    with pytest.raises(ConfigError, match="test_fraction"):
        evaluate.run(config_of(workdir))


def test_curves_are_thinned_but_keep_every_validation_and_the_last_record(tmp_path):
    lines = [{"step": step, "loss": 1.0} for step in range(2000)]
    lines[77]["validation/perplexity"] = 3.0
    (tmp_path / "memory").mkdir()
    text = "".join(json.dumps(line) + "\n" for line in lines)
    edited = '{"loss": 1.0}\n{"step": 7, "loss": null}\n{"step": "a"}\n'
    (tmp_path / "memory" / "metrics.jsonl").write_text(edited + text + '{"step": 2000, "lo')
    curve = provenance.training_curves(tmp_path)["memory"]
    assert len(curve) <= provenance.CURVE_RECORDS + 1
    assert {0, 77, 1999} - {record["step"] for record in curve} <= {0}
    assert provenance.training_curves(tmp_path)["base"] == []
