"""Artifacts: what is written comes back, what is damaged is refused, what is unfinished resumes."""

import json
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from workdirs import bytes_by_file

from mlpmem_jax.core import manifests
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter, find_finished, open_artifact
from mlpmem_jax.core.errors import ArtifactError

ROWS, PER_SHARD, CAPACITY = 10, 4, 1000
SPECS = {
    "keys": ArraySpec((ROWS, 5, 3), "float16", PER_SHARD, (1, 5, 3)),
    "ids": ArraySpec((3, CAPACITY), "uint16", 1, (1, 64)),
}
CONFIG = {"seed": 1, "sizes": (1, 2)}


def content(shard):
    random = np.random.default_rng(shard)
    rows = min(PER_SHARD, ROWS - shard * PER_SHARD)
    return {
        "keys": random.normal(size=(rows, 5, 3)).astype(np.float16),
        "ids": random.integers(1, 60000, (1, 70 * shard + 1)).astype(np.uint16),
    }


def write(path, shards=(0, 1, 2), seal=True):
    writer = ArtifactWriter.create(path, "datastore", CONFIG, {"tokens": "f"}, SPECS)
    for shard in shards:
        writer.write_shard(shard, content(shard), {"entries": shard})
    if not seal:
        return writer
    writer.write_file("tokenizer.json", b"{}")
    return writer.seal({"note": 0.5}, files=("tokenizer.json",))


def test_what_is_written_comes_back(tmp_path):
    write(tmp_path / "a")
    artifact = find_finished(tmp_path / "a", "datastore", CONFIG, {"tokens": "f"})
    rows = np.concatenate([content(shard)["keys"] for shard in range(3)])
    np.testing.assert_array_equal(artifact.read("keys", 3, 9), rows[3:9])
    np.testing.assert_array_equal(artifact.read_ragged("ids", 2), content(2)["ids"][0])
    np.testing.assert_array_equal(artifact.read_ragged("ids", 2, 30, 100), content(2)["ids"][0, 30:100])
    assert json.loads((tmp_path / "a" / "manifest.json").read_bytes())["shards"][2]["extra"] == {"entries": 2}
    assert artifact.summary == {"note": 0.5}
    assert artifact.read_file("tokenizer.json") == b"{}"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"shape":[10,5,3]', '"shape":[10,5,7]'),
        ('"shape":[10,5,3]', '"shape":[18,5,3]'),
        ('"data_type":"float16"', '"data_type":"int16"'),
        ('"fill_value":0.0', '"fill_value":1.0'),
        ('"name":"crc32c"', '"name":"zstd"'),
    ],
)
def test_metadata_of_an_array_that_was_changed_is_refused(tmp_path, before, after):
    write(tmp_path / "a")
    metadata = tmp_path / "a" / "keys" / "zarr.json"
    assert before in metadata.read_text()
    metadata.write_text(metadata.read_text().replace(before, after, 1))
    with pytest.raises(ArtifactError, match="a/keys: could not be read back"):
        open_artifact(tmp_path / "a", "datastore").read("keys", 0, 2)


def test_bytes_do_not_depend_on_interruptions_or_order(tmp_path):
    write(tmp_path / "a")
    write(tmp_path / "b", shards=(2,), seal=False)
    writer = ArtifactWriter.create(tmp_path / "b", "datastore", CONFIG, {"tokens": "f"}, SPECS)
    assert writer.incomplete_shards() == [0, 1]
    write(tmp_path / "b", shards=(1, 0))
    assert bytes_by_file(tmp_path / "a") == bytes_by_file(tmp_path / "b")


def test_a_shard_without_its_record_is_written_again(tmp_path):
    """A kill between the data and the record leaves data that must not count."""
    write(tmp_path / "a", seal=False)
    (tmp_path / "a" / "shards" / "000001.json").unlink()
    assert ArtifactWriter.create(tmp_path / "a", "datastore", CONFIG, {"tokens": "f"}, SPECS).incomplete_shards() == [1]


def test_unfinished_is_neither_found_nor_opened_nor_sealed(tmp_path):
    writer = write(tmp_path / "a", shards=(0, 2), seal=False)
    assert find_finished(tmp_path / "a", "datastore", CONFIG, {"tokens": "f"}) is None
    with pytest.raises(ArtifactError, match="unfinished"):
        open_artifact(tmp_path / "a", "datastore")
    with pytest.raises(ArtifactError, match=r"shards \[1\] are incomplete"):
        writer.seal({})


def test_missing_and_foreign_folders(tmp_path):
    with pytest.raises(ArtifactError, match="found none"):
        open_artifact(tmp_path / "nothing", "datastore")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("mine")
    with pytest.raises(ArtifactError, match="is not empty"):
        ArtifactWriter.create(tmp_path / "notes", "datastore", CONFIG, {}, SPECS)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"format": "another program"}')
    with pytest.raises(ArtifactError, match="not an artifact"):
        open_artifact(tmp_path / "other", "datastore")


def test_the_parent_of_a_link_is_that_of_its_target(tmp_path):
    """As for the operating system; the report, the checkpoints and the arrays of a run are in one folder."""
    (tmp_path / "disk" / "here").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "here")
    write(tmp_path / "link" / ".." / "a")
    assert (tmp_path / "disk" / "a" / "keys" / "zarr.json").exists()
    assert open_artifact(str(tmp_path / "link" / ".." / "a"), "datastore").summary == {"note": 0.5}


def test_inputs_may_be_moved(tmp_path):
    """Their content identifies them, wherever another machine has it."""
    config, inputs = {"corpus": {"path": "/a/text", "seed": 1}, "tokenizer": {"path": ""}}, {"files": "f"}
    ArtifactWriter.create(tmp_path / "a", "tokens", config, inputs, {}).seal({})
    config["corpus"]["path"] = "/b/text"
    assert find_finished(tmp_path / "a", "tokens", config, inputs).kind == "tokens"
    with pytest.raises(ArtifactError, match=r"another config: inputs\.files: 'f' there, 'g' now\."):
        find_finished(tmp_path / "a", "tokens", config, {"files": "g"})
    with pytest.raises(ArtifactError, match=r"config\.corpus\.path: '/a/text' there, '/b/text' now"):
        find_finished(tmp_path / "a", "tokens", config, {})
    config["corpus"]["seed"] = 2
    with pytest.raises(ArtifactError, match=r"another config: config\.corpus\.seed: 1 there, 2 now\."):
        find_finished(tmp_path / "a", "tokens", config, inputs)


def test_another_config_or_input_is_refused_by_name(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(ArtifactError, match=r"config.seed: 1 there, 2 now"):
        find_finished(tmp_path / "a", "datastore", {**CONFIG, "seed": 2}, {"tokens": "f"})
    with pytest.raises(ArtifactError, match=r"inputs.tokens: 'f' there, 'g' now"):
        ArtifactWriter.create(tmp_path / "a", "datastore", CONFIG, {"tokens": "g"}, SPECS)
    with pytest.raises(ArtifactError, match="expected an artifact of kind 'targets'"):
        open_artifact(tmp_path / "a", "targets")
    with pytest.raises(ArtifactError, match="already sealed"):
        ArtifactWriter.create(tmp_path / "a", "datastore", CONFIG, {"tokens": "f"}, SPECS)


def test_a_newer_version_is_refused(tmp_path):
    write(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))
    with pytest.raises(ArtifactError, match="has version 99"):
        open_artifact(tmp_path / "a", "datastore")


@pytest.mark.parametrize(("old", "new"), [(b'"version"', b'"v"'), (b'"version": 1', b'"version": ""'), (b"{", b"[")])
def test_a_damaged_manifest_is_named(tmp_path, old, new):
    write(tmp_path / "a")
    file = tmp_path / "a" / "manifest.json"
    file.write_bytes(file.read_bytes().replace(old, new, 1))
    with pytest.raises(ArtifactError, match=rf"^{file}: "):
        open_artifact(tmp_path / "a", "datastore")


def test_a_damaged_record_of_a_shard_is_named(tmp_path):
    writer = write(tmp_path / "a", seal=False)
    record = tmp_path / "a" / "shards" / "000001.json"
    record.write_bytes(record.read_bytes()[:-9])
    with pytest.raises(ArtifactError, match=rf"^{record}: not valid JSON .* delete it"):
        writer.seal({})
    record.unlink()
    assert writer.incomplete_shards() == [1]


@pytest.mark.parametrize("content", [b"../\xffoo\n", b"../a\0b\n"])
def test_a_damaged_link_is_named(tmp_path, content):
    manifests.link(tmp_path / "used", tmp_path / "made")
    (tmp_path / "used" / "link").write_bytes(content)
    with pytest.raises(ArtifactError, match="used/link: names no folder"):
        open_artifact(tmp_path / "used", "datastore")


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_anywhere_is_refused(tmp_path_factory, data):
    """Whatever file of the artifact a bit flips in, some call on the way to the data names that file or its array."""
    path = tmp_path_factory.mktemp("flip") / "a"
    write(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    position = data.draw(st.integers(0, file.stat().st_size - 1), label="byte")
    damaged = bytearray(file.read_bytes())
    damaged[position] ^= 1 << data.draw(st.integers(0, 7), label="bit")
    file.write_bytes(damaged)

    def read_all():
        artifact = open_artifact(path, "datastore")
        keys = artifact.read("keys", 0, ROWS)
        ids = [artifact.read_ragged("ids", shard) for shard in range(3)]
        artifact.read_file("tokenizer.json")
        return keys, ids

    try:
        keys, ids = read_all()
    except ArtifactError as error:
        message = str(error)
    else:
        message = None
    if message is not None:
        assert str(path) in message
        return
    # The only damage that may pass is damage to bytes that mean nothing: the data read must be right.
    np.testing.assert_array_equal(keys, np.concatenate([content(shard)["keys"] for shard in range(3)]))
    for shard in range(3):
        np.testing.assert_array_equal(ids[shard], content(shard)["ids"][0])


def test_truncated_and_missing_files_are_refused_at_opening(tmp_path):
    write(tmp_path / "a")
    file = tmp_path / "a" / "keys" / "c" / "1" / "0" / "0"
    whole = file.read_bytes()
    file.write_bytes(whole[:-7])
    with pytest.raises(ArtifactError, match=r"keys/c/1/0/0: expected .* bytes, found"):
        open_artifact(tmp_path / "a", "datastore")
    file.unlink()
    with pytest.raises(ArtifactError, match="found 0"):
        open_artifact(tmp_path / "a", "datastore")


def test_a_full_disk_leaves_what_was_complete(tmp_path):
    mounted = tmp_path / "small"
    mounted.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=320k", "none", str(mounted)], capture_output=True
    ).returncode:
        pytest.skip("mounting a small file system needs root")
    try:
        specs = {"keys": ArraySpec((3, 60_000), "float16", 1, (1, 60_000))}
        writer = ArtifactWriter.create(mounted / "a", "datastore", CONFIG, {}, specs)
        rows = np.random.default_rng(0).normal(size=(1, 60_000)).astype(np.float16)
        writer.write_shard(0, {"keys": rows})
        writer.write_shard(1, {"keys": rows})
        with pytest.raises(ArtifactError, match="free some space"):
            writer.write_shard(2, {"keys": rows})
        again = ArtifactWriter.create(mounted / "a", "datastore", CONFIG, {}, specs)
        assert again.incomplete_shards() == [2]
    finally:
        subprocess.run(["umount", str(mounted)], check=True)
