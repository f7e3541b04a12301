"""A comparison, and what is trained for it, is of parts that were made from each other."""

import shutil

import pytest

from configs import smoke
from mlpmem_jax.comparison.systems import SYSTEMS, Workdir
from mlpmem_jax.core.artifacts import ArtifactWriter
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.training import controls, lora, train_memory

MADE_FROM = {
    "tokens": {},
    "base": {"tokens": "tokens"},
    "datastore/train": {"tokens": "tokens", "base": "base"},
    "targets/train": {"datastore/train": "datastore/train"},
    "memory": {"base": "base", "datastore": "datastore/train", "targets": "targets/train"},
    "controls/continued": {"base": "base", "memory": "memory"},
}


@pytest.fixture
def config(tmp_path):
    config = smoke.get_config()
    config.workdir = str(tmp_path)
    fingerprints = {}
    for folder, inputs in MADE_FROM.items():
        kind = "base" if folder == "controls/continued" else folder.split("/")[0]
        made_from = {name: fingerprints[other] for name, other in inputs.items()}
        writer = ArtifactWriter.create(tmp_path / folder, kind, {}, made_from, {})
        fingerprints[folder] = writer.seal({"training_flops": 1.0, "model": {"family": "gpt2"}}).fingerprint
    return config


def make_anew(config, folder):
    """Another artifact of the same kind and inputs."""
    path = f"{config.workdir}/{folder}"
    kind, inputs = folder.split("/")[0], MADE_FROM[folder]
    artifacts = Workdir(config)
    made_from = {name: artifacts.artifact(other, other.split("/")[0]).fingerprint for name, other in inputs.items()}
    shutil.rmtree(path)
    ArtifactWriter.create(path, kind, {"remade": True}, made_from, {}).seal({"training_flops": 1.0})


@pytest.mark.parametrize(
    ("remade", "refused"),
    [
        ("tokens", "base"),
        ("base", "memory"),
        ("datastore/train", "memory"),
        ("targets/train", "memory"),
        ("memory", "cpt"),
        ("base", "cpt"),
        ("datastore/train", "knn_lm"),
    ],
)
def test_parts_that_were_made_anew_are_refused(config, remade, refused):
    for system in SYSTEMS.values():
        if system.model != "lora":
            Workdir(config).parts(system)
    make_anew(config, remade)
    with pytest.raises(ArtifactError, match=rf"was made from another \w+ than the one at \S+{remade};"):
        Workdir(config).parts(SYSTEMS[refused])


def test_the_memory_does_without_a_datastore_that_was_deleted(config):
    shutil.rmtree(f"{config.workdir}/datastore")
    assert Workdir(config).artifact("memory", "memory").kind == "memory"


@pytest.mark.parametrize("train", [controls.continued, lora.run])
def test_nothing_is_trained_beside_a_memory_of_another_base(config, train):
    make_anew(config, "base")
    with pytest.raises(ArtifactError, match="memory: was made from another base"):
        train(config)


@pytest.mark.parametrize("train", [controls.continued, lora.run])
def test_nothing_is_trained_beside_a_memory_of_unknown_cost(config, train):
    shutil.rmtree(f"{config.workdir}/memory")
    made_from = {"base": Workdir(config).artifact("base", "base").fingerprint}
    ArtifactWriter.create(f"{config.workdir}/memory", "memory", {"imported": {}}, made_from, {}).seal({})
    with pytest.raises(UserError, match="memory: was imported, so its training cost"):
        train(config)


def test_no_memory_is_trained_on_the_states_of_another_base(config):
    make_anew(config, "base")
    with pytest.raises(ArtifactError, match="datastore/train: was made from another base"):
        train_memory.run(config)
