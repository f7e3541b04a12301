"""What a base is imported from: recognized when it changes, read from buckets and from the hub at a commit."""

import shutil
import sys
import types
from typing import ClassVar

import jax
import numpy as np
import pytest
import torch
from etils import epath
from fsspec.implementations.memory import MemoryFileSystem
from interop_data import GPT2, LENGTH, config_for, noisy, write_tokens

from mlpmem_jax.core import storage
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.interop import base_model, huggingface, sources
from mlpmem_jax.models import language_model


def write_model(folder, seed=0):
    parameters = noisy(jax.jit(language_model.init, static_argnums=0)(GPT2, jax.random.key(seed)), seed)
    shutil.rmtree(folder, ignore_errors=True)
    huggingface.save_language_model(folder, parameters, GPT2)
    return parameters


def config_of(workdir, path):
    write_tokens(epath.Path(workdir))
    config = config_for(workdir, base__context_length=LENGTH)
    config.base.update({"source": "huggingface", "path": str(path)})
    return config


def load(folder):
    return huggingface.load_language_model(folder, Sharding(make_mesh(1, 1, 1, jax.devices()[:1])))[0]


@pytest.mark.parametrize("hashed_bytes", [2**28, 10])
def test_other_weights_under_the_same_path_are_refused(tmp_path, monkeypatch, hashed_bytes):
    monkeypatch.setattr(storage, "_HASHED_BYTES", hashed_bytes)
    write_model(tmp_path / "model")
    config = config_of(tmp_path / "run", tmp_path / "model")
    first = base_model.run(config)
    assert base_model.run(config).fingerprint == first.fingerprint
    write_model(tmp_path / "model", seed=1)  # of the same sizes
    with pytest.raises(ArtifactError, match=r"inputs\.weights: "):
        base_model.run(config)


class Bucket(MemoryFileSystem):
    protocol = ("gs", "gcs")
    store: ClassVar = {}
    pseudo_dirs: ClassVar = [""]

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


@pytest.fixture
def bucket(monkeypatch):
    """An object store in this process's memory under gs://."""
    monkeypatch.setitem(sys.modules, "gcsfs", types.ModuleType("gcsfs"))
    for name in ("gs", "gcs"):
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, name, Bucket)
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    yield Bucket()
    epath.backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.store.clear()


def test_a_folder_of_a_bucket_is_read_and_recognized(tmp_path, bucket):
    expected = write_model(tmp_path / "model")
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(b"of no use beside safetensors")
    bucket.put(str(tmp_path / "model"), "gs://bucket/model", recursive=True)
    source = "gs://bucket/model"
    before = sources.identity(source)
    assert before == sources.identity(str(tmp_path / "model"))
    with sources.local(source) as (folder, commit):
        assert commit == ""
        assert sorted(file.name for file in folder.iterdir()) == ["config.json", "model.safetensors"]
        jax.tree.map(np.testing.assert_array_equal, load(folder), expected)
    assert not folder.exists()
    with pytest.raises(UserError, match=r"^gs://bucket/model: damaged$"), sources.local(source) as (folder, _):
        raise UserError(f"{folder}: damaged")
    bucket.pipe("gs://bucket/model/config.json", b"{}")
    assert sources.identity(source) != before
    with pytest.raises(UserError, match="gs://bucket/absent: no such"), sources.local("gs://bucket/absent"):
        pass


def test_a_disk_without_room_for_copies_is_told_first(tmp_path, bucket, monkeypatch):
    bucket.pipe("gs://bucket/model.gguf", b"x" * 1000)
    with sources.local("gs://bucket/model.gguf") as (file, _):
        assert (file.name, file.stat().st_size) == ("model.gguf", 1000)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=999))
    with pytest.raises(UserError, match="set the environment variable TMPDIR"), sources.local("gs://bucket/model.gguf"):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's client with one model at two commits; what it was asked for is kept in `asked`."""
    import huggingface_hub

    commits = {None: "c0ffee", "v1": "decade"}
    for seed, commit in enumerate(commits.values()):
        write_model(tmp_path / commit, seed)
    asked = []

    def model_info(self, name, revision=None):
        files = ["README.md", "config.json", "model.safetensors", "pytorch_model.bin", "tf_model.h5"]
        siblings = [types.SimpleNamespace(rfilename=file) for file in files]
        return types.SimpleNamespace(sha=commits[revision], siblings=siblings)

    def download(name, revision=None, allow_patterns=None, local_files_only=False):
        asked.append((name, revision, allow_patterns))
        return str(tmp_path / commits.get(revision, revision))

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return types.SimpleNamespace(asked=asked, client=huggingface_hub)


@pytest.mark.parametrize(("name", "commit"), [("owner/model", "c0ffee"), ("owner/model@v1", "decade")])
def test_the_commit_of_a_hub_model_stands_in_the_manifest(tmp_path, hub, name, commit):
    artifact = base_model.run(config_of(tmp_path / "run", name))
    assert artifact.summary["commit"] == commit
    assert hub.asked == [("owner/model", commit, ["config.json", "model.safetensors"])]


def test_without_a_network_what_was_downloaded_before_is_taken(hub, monkeypatch):
    def offline(*_, **__):
        raise OSError("offline")

    monkeypatch.setattr(hub.client.HfApi, "model_info", offline)
    with sources.local("owner/model@v1") as (_, commit):
        assert commit == "decade"


def test_a_single_file_is_read_where_a_stale_index_lies_beside_it(tmp_path):
    write_model(tmp_path / "model", seed=1)
    huggingface.save_language_model(tmp_path / "old", write_model(tmp_path / "x"), GPT2, maximum_shard_bytes=8000)
    for file in (tmp_path / "old").glob("model*"):
        shutil.copy(file, tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model"), write_model(tmp_path / "y", seed=1))


def test_pickled_weights_are_read_as_safetensors_are(tmp_path):
    expected = write_model(tmp_path / "model")
    tensors = {
        tensor.name: torch.tensor(np.ascontiguousarray(tensor.read())) for tensor in huggingface.tensors(expected, GPT2)
    }
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "model"), expected)
    tensors["transformer.ln_f.bias"][2] = float("inf")
    torch.save(tensors, tmp_path / "model" / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin: tensor 'transformer\.ln_f\.bias' has values that"):
        load(tmp_path / "model")
