"""What the stage says it needs, and what it does where a host has less."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import types

import numpy as np
import pytest
from etils import epath
from retrieval_data import LENGTH, WIDTH, config_for, write_tokens, write_workdir
from workdirs import write_datastore

from configs import llama2_7b, mistral_7b, wikitext103_gpt2_large, wikitext103_gpt2_small
from mlpmem_jax import cli, stages
from mlpmem_jax.core import host, preflight
from mlpmem_jax.core.artifacts import ArraySpec, ArtifactWriter, open_artifact
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.planning import cost, programs
from mlpmem_jax.retrieval import backends, needs, scann_backend, targets, tiles
from mlpmem_jax.retrieval.key_shards import KeyShards, Search

GIB = 2**30
NEEDS = needs.ProcessNeeds(fixed=1 * GIB, shard=4 * GIB, disk=3 * GIB)


def test_too_many_keys_for_the_memory_are_refused(monkeypatch):
    monkeypatch.setattr(host, "memory_bytes", lambda: 3 * GIB)
    with pytest.raises(ConfigError, match=r"a shard of 1,000 keys takes 5\.0 GiB .* lower it to 500 or"):
        needs.check(NEEDS, 1000, epath.Path("runs"))
    monkeypatch.setattr(host, "memory_bytes", lambda: GIB // 2)
    with pytest.raises(ConfigError, match=r"this machine has 0\.5 GiB; use a machine with more"):
        needs.check(NEEDS, 1000, epath.Path("runs"))


def test_processes_of_a_host_share_its_memory(monkeypatch):
    monkeypatch.setattr(host, "memory_bytes", lambda: 16 * GIB)
    needs.check(NEEDS, 1000, epath.Path("runs"))
    monkeypatch.setattr(needs, "processes_of_host", lambda: 4)
    with pytest.raises(ConfigError, match=r"in each of 4 processes of this host, .* lower it to 750"):
        needs.check(NEEDS, 1000, epath.Path("runs"))


def test_indices_of_a_bucket_need_room_for_temporary_files(monkeypatch):
    monkeypatch.setattr(host, "memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=2 * GIB))
    needs.check(NEEDS, 900, epath.Path("runs"))  # local: the index stays where it is built
    with pytest.raises(ConfigError, match=r"takes 3\.0 GiB of temporary files .* lower it to 600 or"):
        needs.check(NEEDS, 900, epath.Path("gs://bucket/runs"))


def test_pods_leave_a_part_of_their_nodes_disk_free(monkeypatch):
    monkeypatch.setattr(host, "memory_bytes", lambda: 16 * GIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(free=4 * GIB, total=10 * GIB))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    needs.check(NEEDS, 900, epath.Path("gs://bucket/runs"))
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    with pytest.raises(ConfigError, match=r"has 2\.5 GiB free; lower it to 750 or"):
        needs.check(NEEDS, 900, epath.Path("gs://bucket/runs"))


def test_the_stage_refuses_before_it_writes(tmp_path, monkeypatch):
    write_workdir(tmp_path)
    monkeypatch.setattr(host, "memory_bytes", lambda: 30_000)
    with pytest.raises(ConfigError, match="a shard of 640 keys takes"):
        targets.run(config_for(tmp_path, backend="exact", search_dimensions=4, key_shard_rows=10**6))
    assert not (tmp_path / "targets").exists()


def rows_checked(monkeypatch, config):
    """(keys per shard and bytes of memory that `check_run` compares with the host's, or None; what it returns)."""
    checked = []
    monkeypatch.setattr(needs, "check", lambda needed, rows, scratch: checked.append((rows, needed.memory)))
    is_known = needs.check_run(config)
    return (checked[0] if checked else None), is_known


def unsealed_tokens(workdir, count):
    """As many of every split."""
    spec = ArraySpec((1, 8192), "uint16", 1, (1, 4096))
    writer = ArtifactWriter.create(workdir / "tokens", "tokens", {}, {}, dict.fromkeys(SPLITS, spec))
    writer.write_shard(0, {split: np.zeros((1, count), np.uint16) for split in SPLITS})
    return writer


def test_a_run_is_checked_as_soon_as_its_keys_are_known(tmp_path, monkeypatch):
    config = wikitext103_gpt2_small.get_config()
    config.workdir = str(tmp_path)
    config.targets.backend = "exact"  # of one process: two copies of the keys
    config.base.context_length = 16
    writer = unsealed_tokens(tmp_path, 6411)
    assert rows_checked(monkeypatch, config) == (None, False)  # not finished
    writer.seal({"vocab_size": 1000})
    (rows, memory), is_known = rows_checked(monkeypatch, config)
    assert is_known
    assert rows == 6400  # whole sequences, and the next token of the last
    assert memory > rows * 4 * 1600  # GPT-2 xl's, whose width is published
    config.targets.key_shard_rows = 1000
    assert rows_checked(monkeypatch, config)[0][0] == 1000
    config.datastore.key_model = "someone/unheard-of"
    assert rows_checked(monkeypatch, config) == (None, False)
    ArtifactWriter.create(tmp_path / "key_model", "base", {}, {}, {}).seal({"model": {"width": 64}})
    assert rows_checked(monkeypatch, config)[0][1] < memory
    for split in SPLITS:
        ArtifactWriter.create(tmp_path / "targets" / split, "targets", {}, {}, {}).seal({"max_entries": 3})
    assert rows_checked(monkeypatch, config) == (None, True)


@pytest.mark.parametrize(
    ("key_model", "before"), [("openai-community/gpt2-xl", ["tokens"]), ("own", ["tokens", "base"])]
)
def test_a_run_is_refused_before_its_stages_are_paid_for(tmp_path, monkeypatch, key_model, before):
    """With the real number of processes of the host: 8 for 8 GPUs."""
    started = []

    def run(name, config):
        started.append(name)
        if name == "tokens":
            unsealed_tokens(tmp_path, 6411).seal({"vocab_size": 1000})
        if name == "base":
            ArtifactWriter.create(tmp_path / "key_model", "base", {}, {}, {}).seal({"model": {"width": 1600}})

    monkeypatch.setattr(stages, "run", run)
    monkeypatch.setattr(needs, "num_sequences", lambda stream, length: 10**6)
    monkeypatch.setattr(preflight, "check_artifacts", lambda *_: None)
    monkeypatch.setattr(preflight, "check_devices", lambda *_: None)
    monkeypatch.setattr(host, "memory_bytes", lambda: 512 * GIB)
    config = wikitext103_gpt2_small.get_config()
    config.workdir, config.datastore.key_model = str(tmp_path), key_model
    cli._dispatch(types.SimpleNamespace(verb="run"), config)
    assert started == list(stages.STAGES)
    started.clear()
    for folder in ("tokens", "key_model"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    monkeypatch.setattr(needs, "processes_of_host", lambda: 8)
    with pytest.raises(ConfigError, match=r"a shard of 8,000,000 keys takes 69\.\d GiB .* in each of 8 processes"):
        cli._dispatch(types.SimpleNamespace(verb="run"), config)
    assert started == before


@pytest.mark.parametrize("key_shard_rows", [10**6, 200])
def test_neighbors_between_shards_of_keys_take_what_is_stated(tmp_path, monkeypatch, key_shard_rows):
    write_workdir(tmp_path)
    config = config_for(tmp_path, backend="exact", key_shard_rows=key_shard_rows)
    sizes = []

    def make_tile(*arguments, make_tile=tiles._make_tile):
        files = (tmp_path / "targets" / "scratch").glob("*/neighbors/*/*.npy")
        sizes.append(sum(np.load(file).nbytes for file in files))
        make_tile(*arguments)

    monkeypatch.setattr(tiles, "_make_tile", make_tile)
    targets.run(config)
    search = Search.create(backends.planned("exact"), config.targets)
    queries = (40 + 6 + 5) * LENGTH
    stated = needs.of_scratch(search, 40, LENGTH, queries, key_shard_rows, WIDTH, 2, config.targets.k)
    assert max(sizes) == stated.neighbors
    assert (stated.neighbors > 0) == (key_shard_rows < 10**6)
    assert stated.indices == 0
    assert not (tmp_path / "targets" / "scratch").exists()


@pytest.mark.skipif(bool(scann_backend.unavailable()), reason="ScaNN has no wheel for this machine")
def test_indices_take_what_is_stated(tmp_path):
    write_workdir(tmp_path, 520)  # two indices of more than 4,096 keys, fewer of which would make no tree
    search = Search.create(scann_backend.Backend, {"k": 12, "leaves": 16, "training_sample": 1000})
    datastore = open_artifact(tmp_path / "datastore" / "train", "datastore")
    key_shards = KeyShards.prepare(datastore, 5000, epath.Path(tmp_path), search)
    for number in range(2):
        key_shards.open(number)
    stored = sum(file.stat().st_size for file in tmp_path.glob("index_*/*"))
    stated = needs.of_scratch(search, 520, LENGTH, 531 * LENGTH, 5000, WIDTH, 2, 12)
    assert stored == pytest.approx(stated.indices, rel=0.1)  # besides, the centers of clusters and hashes


@pytest.mark.parametrize("module", [wikitext103_gpt2_small, wikitext103_gpt2_large, mistral_7b, llama2_7b])
def test_ready_configs_fit_a_tpu_vm(module):
    """A host of v5e: 192 GB of memory, 100 GB of disk, some of both taken."""
    config = module.get_config()
    width = programs.models_of(config, 1).keys.width
    search = Search.create(backends.planned(config.targets.backend), config.targets)
    assert search.backend.needs(config.targets.key_shard_rows, width, 2, 16).disk < 85e9
    memory = {artifact.name: artifact.host for artifact in cost.artifacts(config, 100_000_000, 16)}
    assert memory["targets, while built"] < 170e9


@pytest.mark.slow
@pytest.mark.parametrize(("width", "rows"), [(576, 60_000), (1280, 30_000), (4096, 12_000)])
def test_the_stage_takes_about_what_it_says(tmp_path, width, rows):
    """Within a fifth: the resident memory of a process of its own, at its highest."""
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((500, width), np.float32)
    write_tokens(tmp_path)
    for split, positions in (("train", rows), ("validation", 1600), ("test", 1600)):
        shape = positions // LENGTH, LENGTH
        keys = centers[rng.integers(500, size=shape)]
        keys += 0.5 * rng.standard_normal(keys.shape, np.float32)
        arrays = {
            "keys": keys.astype(np.float16),
            "next_tokens": rng.integers(50, size=shape, dtype=np.int32),
            "documents": (np.arange(positions, dtype=np.int32) // 500).reshape(shape),
        }
        if split != "train":
            arrays["base_log_probabilities"] = np.full(shape, -3, np.float32)
        write_datastore(tmp_path / "datastore" / split, arrays, per_shard=256)
    program = (
        "import sys; sys.path.insert(0, 'tests'); from retrieval_data import config_for; "
        "from mlpmem_jax.core import host; from mlpmem_jax.retrieval import targets; "
        f"targets.run(config_for({str(tmp_path)!r}, k=64, recall=0.5, quality_positions=2048)); "
        "print('peak', host.peak_rss_bytes())"
    )
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "MLPMEM_QUIET": "0", "XLA_FLAGS": ""}
    child = subprocess.run(
        [sys.executable, "-c", program], cwd=root, env=environment, capture_output=True, check=True, text=True
    )
    stated = float(re.search(r"take at most ([\d.]+) GiB", child.stdout + child.stderr)[1]) * GIB
    peak = int(child.stdout.rsplit("peak ", 1)[1])
    assert 0.8 * stated < peak < 1.2 * stated, f"{peak / GIB:.2f} GiB taken, {stated / GIB:.2f} GiB stated"
