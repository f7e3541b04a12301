"""A toy sweep trained for real: two sizes, two arms, from text to points.csv."""

import csv
import json
import textwrap

import numpy as np
import pytest

from mlpmem_jax import cli
from mlpmem_jax.core import artifacts, manifests
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.scaling import collection, points, sweep, tasks

pytestmark = pytest.mark.slow

# At width 16 the base is "trained on" at a rate of zero, which must give the base itself.
SWEEP = """
    from configs import smoke
    from configs.sweeps import point

    def get_sweep():
        config = smoke.get_config()
        config.workdir = {workdir!r}
        config.corpus.update({{"source": "files", "path": {text!r}, "max_bytes": 0, "document_bytes": 500}})
        config.tokenizer.vocab_size = 300
        config.base.update({{"context_length": 16, "blocks": 1}})
        config.base.training.update({{"steps": 10, "warmup_steps": 2, "optimizer": "adamw"}})
        config.training.update({{"batch_sequences": 8, "warmup_steps": 2, "optimizer": "adamw"}})
        config.targets.update({{"k": 5, "temperature": 3.0, "backend": "exact", "quality_positions": 64}})
        config.memory.update({{"blocks": 1}})
        config.evaluation.update({{"sharpness_positions": 50}})
        points = []
        for width in (16, 32):
            size = {{"base.width": width, "memory.width": width}}
            rate = {{"training.learning_rate": 0.0 if width == 16 else 0.003}}
            points.append(point(f"w{{width}}-continued", "continued", 1e8, overrides=size | rate))
            points.append(point(f"w{{width}}-augmented", "augmented", 1e8, overrides=size))
        return {{"config": config, "counted": "training", "positions": 0, "points": points}}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The sweep, with every task run."""
    folder = tmp_path_factory.mktemp("sweep")
    generator = np.random.default_rng(0)
    words = [f"{first}{second}" for first in ("alpha", "beta", "gamma") for second in ("", "s", " of", " and")]
    lines = [" ".join(generator.choice(words, 12)) for _ in range(250)]
    (folder / "text.txt").write_text("\n\n".join(lines))
    file = folder / "toy.py"
    text = SWEEP.format(workdir=str(folder / "work"), text=str(folder / "text.txt"))
    file.write_text(textwrap.dedent(text))
    actual = sweep.read(str(file))
    for task in tasks.of_sweep(actual):
        assert not task.is_finished()
        task.prepare()
        cli.main([task.verb, f"--config={task.config.workdir}/config.py"])
        assert task.is_finished(), task.name
    return actual


def test_points_say_what_was_trained_and_what_it_cost(trained):
    file = collection.write(trained, {point.name for point in trained.points})
    with open(file, newline="", encoding="utf-8") as text:
        rows = {row["name"]: row for row in csv.DictReader(text)}
    assert list(rows) == [point.name for point in trained.points]
    vocabulary = artifacts.open_artifact(f"{trained.points[0].config.workdir}/tokens", "tokens").summary["vocab_size"]
    for width in (16, 32):
        base = 12 * width**2 + 13 * width + 2 * width + (vocabulary + 16) * width
        memory = 8 * width**2 + 7 * width + 2 * width + 384 * width  # padded to three tiles
        continued, augmented = rows[f"w{width}-continued"], rows[f"w{width}-augmented"]
        assert int(continued["parameters"]) == base
        assert int(augmented["parameters"]) == base + memory
        for row in (continued, augmented):
            assert float(row["flops"]) == float(row["training_flops"]) == pytest.approx(1e8, rel=0.1)
            assert int(row["tokens"]) == int(row["steps"]) * 8 * 16
        assert float(continued["construction_flops"]) == 0
        forward = 2 * 12 * width**2 + 2 * 16 * width
        folder = file.parent / "points" / f"w{width}-augmented"
        datastore = artifacts.open_artifact(folder / "datastore/train", "datastore")
        positions = datastore.summary["positions"]
        assert float(augmented["construction_flops"]) == positions * forward + 2 * width * positions**2
        report = json.loads((folder / "report" / "metrics.json").read_text())
        assert float(augmented["perplexity"]) == report["perplexity"]["test"]["augmented"]
    still = rows["w16-continued"]
    assert float(still["perplexity"]) == pytest.approx(float(rows["w16-augmented"]["base_perplexity"]), rel=1e-4)
    moved = float(rows["w32-continued"]["perplexity"])
    assert moved < 0.999 * float(rows["w32-augmented"]["base_perplexity"])
    with pytest.raises(UserError, match="too few sizes"):
        points.read(points.of_sweep(trained.workdir))


def test_artifacts_are_made_once_and_linked(trained):
    opened_by_task = {}
    for task in tasks.of_sweep(trained):
        for folder in task.links:
            opened = artifacts.open_artifact(f"{task.config.workdir}/{folder}", folder.split("/")[0])
            opened_by_task.setdefault(folder, set()).add(opened.path)
    assert len(opened_by_task["tokens"]) == 1
    assert len(opened_by_task["base"]) == len(opened_by_task["targets/train"]) == 2
    assert all("/shared/" in path for paths in opened_by_task.values() for path in paths)


def test_a_changed_point_is_not_taken_for_the_finished_one(trained):
    actual = {task.name: task for task in tasks.of_sweep(trained)}
    for name in ("w16-augmented", "w16-continued"):
        assert actual[name].is_finished()
        actual[name].config.training.steps += 1
        assert not actual[name].is_finished()
        actual[name].config.training.steps -= 1


def test_points_of_different_tokens_are_refused(trained, tmp_path):
    """Texts that changed between two runs of a sweep, say, under the same config."""
    elsewhere = tmp_path / "tokens"
    actual = {point.name: point for point in trained.points}["w16-continued"]
    link = f"{actual.config.workdir}/tokens/{manifests.LINK}"
    with open(link, encoding="utf-8") as file:
        before = file.read()
    content = manifests.read_manifest(artifacts.open_artifact(f"{actual.config.workdir}/tokens", "tokens").path)
    content = {**content, "inputs": {"other": "text"}, "shards": []}
    content["fingerprint"] = manifests.fingerprint(content)
    elsewhere.mkdir()
    (elsewhere / "manifest.json").write_text(json.dumps(content))
    manifests.link(f"{actual.config.workdir}/tokens", elsewhere)
    try:
        with pytest.raises(ArtifactError, match="were trained on different tokens"):
            collection.write(trained, {point.name for point in trained.points})
    finally:
        with open(link, "w", encoding="utf-8") as file:
            file.write(before)


def test_links_are_for_reading_finished_artifacts(tmp_path):
    spec = {"numbers": artifacts.ArraySpec((4,), "int32", 2, (2,))}
    writer = artifacts.ArtifactWriter.create(tmp_path / "made" / "tokens", "tokens", {"a": 1}, {}, spec)
    manifests.link(tmp_path / "used" / "tokens", tmp_path / "made" / "tokens")
    with pytest.raises(ArtifactError, match=r"is unfinished, and .*used/tokens is a link to it"):
        artifacts.find_finished(tmp_path / "used" / "tokens", "tokens", {"a": 1}, {})
    with pytest.raises(ArtifactError, match="is unfinished"):
        artifacts.open_artifact(tmp_path / "used" / "tokens", "tokens")
    with pytest.raises(ArtifactError, match="is not empty"):
        artifacts.ArtifactWriter.create(tmp_path / "used" / "tokens", "tokens", {"a": 1}, {}, spec)
    for shard in range(2):
        writer.write_shard(shard, {"numbers": np.arange(2) + 2 * shard})
    writer.seal({})
    actual = artifacts.find_finished(tmp_path / "used" / "tokens", "tokens", {"a": 1}, {})
    np.testing.assert_array_equal(actual.read("numbers", 0, 4), np.arange(4))
    with pytest.raises(ArtifactError, match="was made by another config"):
        artifacts.find_finished(tmp_path / "used" / "tokens", "tokens", {"a": 2}, {})
    (tmp_path / "moved").mkdir()
    for name in ("made", "used"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    assert artifacts.open_artifact(tmp_path / "moved" / "used" / "tokens", "tokens").config == {"a": 1}
    with pytest.raises(ArtifactError, match="holds an artifact, where a link"):
        manifests.link(tmp_path / "moved" / "made" / "tokens", tmp_path / "nothing")


@pytest.mark.parametrize("scheme", ["gs://bucket/sweep", "s3://bucket/sweep"])
def test_links_in_object_storage(scheme, tmp_path, monkeypatch):
    """The way from one folder to another is the same as on a disk."""
    root = tmp_path / "bucket"

    def local(path):
        return (root / str(path).split("://")[1]) if "://" in str(path) else tmp_path / path

    monkeypatch.setattr(manifests.epath, "Path", local)
    manifests.link(f"{scheme}/points/a/targets/train", f"{scheme}/shared/targets-1/targets/train")
    assert manifests.located(f"{scheme}/points/a/targets/train") == f"{scheme}/shared/targets-1/targets/train"
