import pwd
import sys
import types

import fsspec.config
import numpy as np
import pytest
from etils import epath

from mlpmem_jax import cli
from mlpmem_jax.core import storage
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter
from mlpmem_jax.core.errors import UserError


@pytest.mark.parametrize(("place", "package", "extra"), [("gs://b/r", "gcsfs", "gcs"), ("s3://b/r", "s3fs", "s3")])
def test_a_bucket_without_its_package(monkeypatch, place, package, extra):
    monkeypatch.setitem(sys.modules, package, None)  # importing it fails, installed or not
    with pytest.raises(UserError, match=rf"{place}: .*'{package}'.*pip install 'mlpmem_jax\[{extra}\]'"):
        storage.prepare("runs/mine", place)


@pytest.mark.parametrize("place", ["runs/mine", "/tmp/runs", ""])
def test_local_places_need_nothing(monkeypatch, place):
    monkeypatch.setattr(fsspec.config, "conf", {})
    storage.prepare(place)
    assert not fsspec.config.conf


def test_another_kind_of_place_is_refused():
    with pytest.raises(UserError, match="ftp://host/x: expected a path, or a URL that begins with gs://, s3://"):
        storage.prepare("ftp://host/x")


def test_listings_of_a_bucket_are_never_kept(monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", types.ModuleType("gcsfs"))
    monkeypatch.setattr(fsspec.config, "conf", {})
    storage.prepare("gs://bucket/run")

    class Bucket(fsspec.AbstractFileSystem):
        protocol = ("gs", "gcs")
        cachable = False

    assert not Bucket().dircache.use_listings_cache


TOKENIZER = ["--config.tokenizer.source=file", "--config.tokenizer.path=tokenizer.json"]


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("workdir", []),
        ("corpus.path", ["--config.corpus.source=files"]),
        ("tokenizer.path", ["--config.tokenizer.source=file"]),
        ("base.path", ["--config.base.source=huggingface", *TOKENIZER]),
        ("datastore.key_model", []),
        ("training.start", []),
    ],
)
def test_the_command_says_so_before_anything_else(monkeypatch, capsys, key, source):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tokens", "--config=configs/smoke.py", f"--config.{key}=gs://bucket/place", *source])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("mlpmem tokens: error: gs://bucket/place: this needs the Python package 'gcsfs'")
    assert len(error.splitlines()) == 1


def test_a_user_without_a_name_keeps_files_and_artifacts(tmp_path, monkeypatch):
    def nobody(uid):
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    file = epath.Path(tmp_path / "text")
    file.write_text("seven!!")
    assert storage.state_of(file) == (7, int((tmp_path / "text").stat().st_mtime))
    writer = ArtifactWriter.create(tmp_path / "artifact", "tokens", {}, {}, {"ids": ArraySpec((4,), "int32", 4, (4,))})
    writer.write_shard(0, {"ids": np.arange(4, dtype=np.int32)})
    assert writer.seal({}).arrays["ids"].shape == (4,)
