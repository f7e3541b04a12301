import itertools
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time
import types

import numpy as np
import pytest
from etils import epath
from retrieval_data import (
    PER_SHARD,
    VOCABULARY,
    brute_force,
    config_for,
    knn_distribution,
    write_workdir,
)
from threadpoolctl import threadpool_info
from workdirs import bytes_by_file

from mlpmem_jax.core.artifacts import ArtifactWriter
from mlpmem_jax.core.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.retrieval import backends, scann_backend, scann_index, scratch, targets, temperature
from mlpmem_jax.retrieval.chunks import in_chunks
from mlpmem_jax.retrieval.tiles import Split

BACKENDS = ["exact", *([] if scann_backend.unavailable() else ["scann"])]


@pytest.fixture
def workdir(tmp_path):
    return tmp_path, write_workdir(tmp_path)


def read_rows(artifact, split_arrays):
    """Every position's stored distribution as a dictionary."""
    sequences = len(split_arrays["next_tokens"])
    rows = []
    for sequence in range(sequences):
        offsets = artifact.read("offsets", sequence, sequence + 1)[0]
        shard = sequence // PER_SHARD
        for start, stop in itertools.pairwise(offsets.tolist()):
            tokens = artifact.read_ragged("token_ids", shard, start, stop)
            probabilities = artifact.read_ragged("probabilities", shard, start, stop)
            rows.append(dict(zip(tokens.tolist(), probabilities.astype(float).tolist(), strict=True)))
    return rows


def expected_rows(arrays, split, k, temperature_, exclude="self"):
    """The targets by the paper's definition, and p_kNN of each next token."""
    keys = arrays["train"]["keys"].astype(np.float64).reshape(-1, arrays["train"]["keys"].shape[2])
    values = arrays["train"]["next_tokens"].ravel()
    queries = arrays[split]["keys"].reshape(-1, keys.shape[1])
    forbidden = None
    if split == "train":
        owner = np.arange(len(keys)) if exclude == "self" else arrays["train"]["documents"].ravel()
        forbidden = owner[:, None] == owner[None, :]
    distances, ids = brute_force(queries, keys, k, forbidden)
    rows = [knn_distribution(d, values[i], temperature_) for d, i in zip(distances, ids, strict=True)]
    labels = arrays[split]["next_tokens"].ravel()
    return rows, [row.get(label, 0.0) for row, label in zip(rows, labels.tolist(), strict=True)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("key_shard_rows", "exclude"), [(10**6, "self"), (200, "self"), (10**6, "document"), (300, "document")]
)
def test_targets_are_the_papers_distributions(workdir, backend, key_shard_rows, exclude):
    folder, arrays = workdir
    config = config_for(folder, backend=backend, key_shard_rows=key_shard_rows, exclude=exclude)
    artifacts = targets.run(config)
    for split in ("train", "validation", "test"):
        expected, labels = expected_rows(arrays, split, 12, 0.5, exclude)
        actual = read_rows(artifacts[split], arrays[split])
        assert len(actual) == len(expected)
        for row, truth in zip(actual, expected, strict=True):
            assert set(row) <= set(truth)
            for token, probability in truth.items():
                assert row.get(token, 0) == pytest.approx(probability, rel=2e-3, abs=1e-5)
        sequences = len(arrays[split]["next_tokens"])
        stored = artifacts[split].read("label_probabilities", 0, sequences).ravel()
        np.testing.assert_allclose(stored, labels, rtol=1e-3, atol=1e-6)
        assert artifacts[split].arrays["token_ids"].dtype == "uint16"
        assert artifacts[split].summary["positions_lacking_k"] == 0
        assert artifacts[split].summary["max_entries"] == max(len(row) for row in actual)
    assert artifacts["train"].summary["recall_at_k"] > 0.999
    assert not (folder / "targets" / "scratch").exists()


def test_a_key_belongs_to_the_token_after_it(workdir):
    """With one neighbor that is a copy of the query, the target is that copy's next token and not its neighbor's."""
    folder, arrays = workdir
    artifacts = targets.run(config_for(folder, k=1, backend="exact"))
    keys = arrays["train"]["keys"].reshape(-1, arrays["train"]["keys"].shape[2]).astype(float)
    following = arrays["train"]["next_tokens"].ravel()
    rows = read_rows(artifacts["test"], arrays["test"])
    agreements = {-1: 0, 0: 0, 1: 0}
    for query, row in zip(arrays["test"]["keys"].reshape(len(rows), -1).astype(float), rows, strict=True):
        nearest = int(np.argmin(((keys - query) ** 2).sum(axis=1)))
        for shift in agreements:
            agreements[shift] += row == {int(following[(nearest + shift) % len(following)]): 1.0}
    assert agreements[0] == len(rows)
    assert max(agreements[-1], agreements[1]) < len(rows) / 5


def test_keep_drops_the_least_probable_and_reports(workdir):
    folder, arrays = workdir
    artifact = targets.run(config_for(folder, keep=2, backend="exact"))["train"]
    expected, _ = expected_rows(arrays, "train", 12, 0.5)
    lost = []
    for row, truth in zip(read_rows(artifact, arrays["train"]), expected, strict=True):
        kept = sorted(truth.values(), reverse=True)[:2]
        assert list(row.values()) == pytest.approx([p / sum(kept) for p in kept], rel=2e-3)
        lost.append(1 - sum(kept))
    assert artifact.summary["dropped_mass"] == pytest.approx(np.mean(lost), abs=1e-4)
    assert artifact.summary["max_entries"] == 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_key_shards_smaller_than_k(workdir, backend):
    folder, arrays = workdir
    artifact = targets.run(config_for(folder, k=100, key_shard_rows=90, backend=backend))["train"]
    expected, _ = expected_rows(arrays, "train", 100, 0.5)
    for row, truth in zip(read_rows(artifact, arrays["train"]), expected, strict=True):
        for token, probability in truth.items():
            assert row.get(token, 0) == pytest.approx(probability, rel=2e-3, abs=1e-5)


def test_a_backend_that_is_not_there_is_refused_or_replaced(monkeypatch):
    monkeypatch.setattr(scann_backend, "unavailable", lambda: "is not installed")
    assert backends.chosen("auto")[0] == "exact"
    with pytest.raises(ConfigError, match="'scann' is not installed"):
        backends.chosen("scann")


def test_positions_that_lack_k_are_counted(workdir):
    folder, _ = workdir
    summary = targets.run(config_for(folder, k=630, exclude="document", backend="exact"))["train"].summary
    assert summary["positions_lacking_k"] == 640  # 640 - 23 of the own document < 630


def test_the_automatic_temperature_is_near_the_best(workdir):
    _, arrays = workdir
    # Next tokens that follow from the key, so that some temperature is better than others.
    rng = np.random.default_rng(0)
    keys = arrays["train"]["keys"].reshape(-1, arrays["train"]["keys"].shape[2]).astype(float)
    direction = rng.normal(size=keys.shape[1])

    def label(rows):
        return np.floor(2 * (rows @ direction)).astype(int) % VOCABULARY

    queries = arrays["validation"]["keys"].reshape(-1, keys.shape[1]).astype(float)
    distances, ids = brute_force(queries, keys, 40)
    base = np.log(rng.uniform(0.05, 0.6, len(queries)))

    def best_mixture(candidate):
        p = [
            knn_distribution(d, label(keys)[i], candidate).get(int(own), 0.0)
            for d, i, own in zip(distances, ids, label(queries), strict=True)
        ]
        return min(-np.mean(np.log(w * np.array(p) + (1 - w) * np.exp(base))) for w in np.linspace(0, 0.99, 100))

    is_label = label(keys)[ids] == label(queries)[:, None]
    choice = temperature.HeldOut(distances.astype(np.float32), is_label, base).best()
    others = [best_mixture(choice.temperature * 2.0**octave) for octave in np.arange(-6, 6.5, 0.5)]
    assert best_mixture(choice.temperature) <= min(others) + 1e-3
    assert np.log(choice.perplexity) == pytest.approx(best_mixture(choice.temperature), abs=1e-3)


@pytest.mark.parametrize(("given", "is_useless"), [(1e-40, True), (0.001, True), (1e6, True), (None, False)])
def test_a_temperature_that_loses_the_gain_is_told(given, is_useless):
    """Distances of 1 to neighbors with the right token and of 3 to others: the best temperature is below 3."""
    rng = np.random.default_rng(0)
    is_label = rng.random((300, 16)) < 0.1
    # The nearest neighbor is a wrong one half of the time, so that trusting it alone loses.
    distances = np.where(is_label, 1.0, 3.0) + rng.normal(size=is_label.shape) * 0.1
    distances[:150, 0], is_label[:150, 0] = 0.8, False
    distances = distances.astype(np.float32)
    held_out = temperature.HeldOut(distances, is_label, np.log(rng.uniform(0.01, 0.2, 300)))
    best = held_out.best()
    given = held_out.mixture(best.temperature * 1.1 if given is None else given)
    said = temperature.compared(given, best, held_out.base_perplexity)
    assert f"{given.perplexity:.3f} at config.targets.temperature" in said
    assert f"{best.perplexity:.3f} at the best" in said
    assert ("set it to 0" in said) == is_useless


def test_automatic_temperature_is_recorded(workdir):
    folder, _ = workdir
    artifacts = targets.run(config_for(folder, temperature=0.0, backend="exact"))
    assert len({artifact.summary["temperature"] for artifact in artifacts.values()}) == 1
    assert artifacts["train"].summary["temperature"] > 0


def test_finished_targets_are_left_alone_and_other_configs_refused(workdir):
    folder, _ = workdir
    first = targets.run(config_for(folder, backend="exact"))
    assert targets.run(config_for(folder, backend="exact"))["test"].fingerprint == first["test"].fingerprint
    with pytest.raises(ArtifactError, match=r"k: 12 there, 13 now"):
        targets.run(config_for(folder, backend="exact", k=13))


def test_bad_input_is_refused_before_anything_is_written(workdir):
    folder, _ = workdir
    with pytest.raises(ConfigError, match=r"targets\.k: 640 neighbors of 640"):
        targets.run(config_for(folder, k=640))
    assert not (folder / "targets").exists()


def test_one_document_leaves_nothing_to_exclude(tmp_path):
    write_workdir(tmp_path, document_length=10**6)
    with pytest.raises(ConfigError, match="single document"):
        targets.run(config_for(tmp_path, exclude="document"))


class Interruption(Exception):
    """Stands for a kill, within the process."""


@pytest.mark.parametrize(
    ("key_shard_rows", "changes"), [(10**6, {}), (250, {}), (400, {"backend": "exact", "recall_target": 0.9})]
)
def test_interrupted_between_any_two_steps_it_ends_with_the_same_bytes(workdir, key_shard_rows, changes, monkeypatch):
    folder, _ = workdir
    config = config_for(folder, key_shard_rows=key_shard_rows, temperature=0.0, quality_positions=32, **changes)
    targets.run(config)
    expected = bytes_by_file(folder / "targets")
    shutil.rmtree(folder / "targets")

    def interrupted_after(owner, name):
        original = getattr(owner, name)

        def step(*arguments, **named):
            original(*arguments, **named)
            raise Interruption

        monkeypatch.setattr(owner, name, step)

    interrupted_after(ArtifactWriter, "write_shard")
    interrupted_after(ArtifactWriter, "seal")
    interrupted_after(Split, "write_tile")
    interrupted_after(scratch, "save_array")  # of measurements
    interruptions, finished = 0, False
    while not finished:
        try:
            targets.run(config)
            finished = True
        except Interruption:
            interruptions += 1
            assert interruptions < 100
    assert interruptions > 10
    assert bytes_by_file(folder / "targets") == expected


def test_killed_while_it_writes_it_ends_with_the_same_bytes(workdir):
    folder, _ = workdir
    settings = {"key_shard_rows": 250, "quality_positions": 32}
    targets.run(config_for(folder, **settings))
    expected = bytes_by_file(folder / "targets")
    shutil.rmtree(folder / "targets")
    program = (
        "import sys; sys.path.insert(0, 'tests'); from retrieval_data import config_for; "
        f"from mlpmem_jax.retrieval import targets; targets.run(config_for({str(folder)!r}, **{settings!r}))"
    )
    process = subprocess.Popen([sys.executable, "-c", program], cwd=pathlib.Path(__file__).parents[1])
    while process.poll() is None and not list(folder.glob("targets/scratch/*/neighbors/train/*.npy")):
        time.sleep(0.001)
    assert process.poll() is None
    process.kill()
    process.wait()
    targets.run(config_for(folder, **settings))
    assert bytes_by_file(folder / "targets") == expected


def run_in_two_processes(folder, settings):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    program = (
        "import sys; sys.path.insert(0, 'tests'); import jax; "
        "jax.config.update('jax_cpu_collectives_implementation', 'gloo'); "
        f"jax.distributed.initialize({address!r}, 2, int(sys.argv[1])); "
        "from retrieval_data import config_for; from mlpmem_jax.retrieval import targets; "
        f"targets.run(config_for({str(folder)!r}, **{settings!r}))"
    )
    root = pathlib.Path(__file__).parents[1]
    environment = {**os.environ, "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"}
    processes = [
        subprocess.Popen([sys.executable, "-c", program, str(rank)], cwd=root, env=environment) for rank in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]


def test_two_processes_share_the_work_and_end_with_the_same_bytes(workdir):
    folder, _ = workdir
    settings = {"key_shard_rows": 250, "temperature": 0.0, "quality_positions": 32}
    targets.run(config_for(folder, **settings))
    expected = bytes_by_file(folder / "targets")
    shutil.rmtree(folder / "targets")
    run_in_two_processes(folder, settings)
    assert bytes_by_file(folder / "targets") == expected


def test_two_processes_search_one_mesh_of_devices(tmp_path):
    """Nine shards of training queries: one of the processes has none left while the other still searches."""
    arrays = write_workdir(tmp_path, sequences=36)
    settings = {"backend": "exact", "key_shard_rows": 300, "exclude": "document", "temperature": 0.0}
    run_in_two_processes(tmp_path, settings)
    artifacts = targets.run(config_for(tmp_path, **settings))  # finished already: opens them
    for split in ("train", "validation", "test"):
        expected, _ = expected_rows(arrays, split, 12, artifacts[split].summary["temperature"], "document")
        for row, truth in zip(read_rows(artifacts[split], arrays[split]), expected, strict=True):
            assert set(row) <= set(truth)
            for token, probability in truth.items():
                assert row.get(token, 0) == pytest.approx(probability, rel=2e-3, abs=1e-4)


def test_chunks_are_in_order_and_their_products_start_no_threads():
    def blas_threads() -> set[int]:
        return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}

    def work(part: slice) -> tuple[int, set[int]]:
        return part.stop - part.start, blas_threads()

    before = blas_threads()
    assert in_chunks(work, 300, 64) == [(256, {1}), (44, {1})]
    assert in_chunks(work, 3, 1 << 20) == [(1, {1})] * 3
    assert blas_threads() == before


def test_searched_tiles_are_found_under_any_name(tmp_path):
    folder = epath.Path(tmp_path) / "x[y]"
    folder.mkdir()
    for name in ("000002.0001.npy", "000002.0001.unfinished", "000003.0000.npy"):
        (folder / name).write_text("")
    assert Split.searched(types.SimpleNamespace(_scratch=folder)) == {2: 2, 3: 1}


def test_scann_that_cannot_be_imported_is_told(monkeypatch):
    def broken():
        raise ImportError("libscann.so: undefined symbol")

    monkeypatch.setattr(scann_index, "scann", broken)
    scann_backend.unavailable.cache_clear()
    try:
        assert backends.chosen("auto")[0] == "exact"
        with pytest.raises(ConfigError, match=r"cannot be imported .*undefined symbol|is not installed"):
            backends.chosen("scann")
    finally:
        scann_backend.unavailable.cache_clear()


def test_distributions_that_are_empty_are_not_sealed(workdir):
    folder, _ = workdir
    with pytest.raises(UserError, match="targets/train: the distributions of shard 0 are empty or not finite; set"):
        targets.run(config_for(folder, backend="exact", minimum_probability=1.0))
    assert not (folder / "targets" / "train" / "shards" / "000000.json").exists()
