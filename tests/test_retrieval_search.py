import subprocess
import sys
import textwrap

import numpy as np
import pytest
from retrieval_data import WIDTH, brute_force, forbidden, mixture

from mlpmem_jax.retrieval import exact, neighbors, scann_index
from mlpmem_jax.retrieval.exact import ExactIndex
from mlpmem_jax.retrieval.scann_index import Options, ScannIndex

needs_scann = pytest.mark.skipif(not scann_index.is_available(), reason="ScaNN has no wheel for this machine")


@pytest.fixture(scope="module")
def keys():
    return mixture(np.random.default_rng(0), 6000, clusters=60).astype(np.float32)


@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize("block", [1 << 20, 128])
def test_exact_search_agrees_with_brute_force(keys, k, block, monkeypatch):
    monkeypatch.setattr(exact, "_KEYS_PER_BLOCK", block)
    keys = keys[:500]
    queries = keys[100:140]
    excluded = np.stack([np.arange(100, 140), np.arange(101, 141)], axis=1)
    distances, ids = ExactIndex(keys).search(queries, k, excluded)
    true_distances, true_ids = brute_force(queries, keys, k, forbidden(excluded, 500))
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(distances, true_distances, rtol=1e-4)


def test_exact_search_takes_the_smaller_ids_of_equal_distances():
    rng = np.random.default_rng(2)
    keys = rng.integers(-3, 4, size=(20, WIDTH))[rng.integers(20, size=2000)].astype(np.float32)
    distances, ids = ExactIndex(keys).search(keys[:30], 40)
    true_distances, true_ids = brute_force(keys[:30], keys, 40)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(distances, true_distances)


def test_exact_search_with_fewer_keys_than_k(keys):
    distances, ids = ExactIndex(keys[:6]).search(keys[:2], 8, np.array([[0, 1], [0, 4]]))
    assert np.isfinite(distances).sum(axis=1).tolist() == [5, 2]
    assert (ids[np.isinf(distances)] == neighbors.MISSING).all()
    assert sorted(ids[1, :2].tolist()) == [4, 5]


@pytest.fixture(scope="module")
def index(keys):
    return ScannIndex.build(keys, Options.derive(len(keys), 20, leaves_to_search=20))


@needs_scann
def test_scann_finds_nearly_all_and_gives_true_distances(keys, index):
    queries = keys[:100]
    excluded = np.stack([np.arange(100), np.arange(1, 101)], axis=1)
    distances, ids = index.search(queries, 20, excluded)
    _, true_ids = brute_force(queries, keys, 20, forbidden(excluded, len(keys)))
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(ids, true_ids, strict=True)])
    assert recall > 0.95
    assert not (ids == np.arange(100)[:, None]).any()
    np.testing.assert_allclose(distances, ((keys[ids] - queries[:, None]) ** 2).sum(axis=2), rtol=1e-4)
    assert (np.diff(distances, axis=1) >= 0).all()


@needs_scann
def test_scann_asks_again_until_a_long_exclusion_is_passed(keys, index):
    # Everything near query 0 is excluded: what is left lies in other leaves.
    order = np.argsort(((keys - keys[0]) ** 2).sum(axis=1))
    sorted_keys = np.ascontiguousarray(keys[order])
    sorted_index = ScannIndex.build(sorted_keys, Options.derive(len(keys), 20))
    distances, ids = sorted_index.search(sorted_keys[:3], 20, np.array([[0, 3000], [0, 0], [10, 20]]))
    assert np.isfinite(distances).all()
    assert ids[0].min() >= 3000


@needs_scann
def test_scann_without_enough_keys_says_so():
    keys = mixture(np.random.default_rng(0), 30).astype(np.float32)
    distances, ids = ScannIndex.build(keys, Options.derive(30, 40)).search(keys, 40, np.tile([[0, 10]], (30, 1)))
    assert (np.isfinite(distances).sum(axis=1) == 20).all()
    assert (ids[np.isinf(distances)] == neighbors.MISSING).all()


@needs_scann
def test_every_key_gets_the_cluster_and_the_hash_that_scann_would_give(keys, tmp_path):
    options = Options.derive(len(keys), 20, training_sample=len(keys))
    scann_index._train(keys, options, tmp_path)
    names = ("dataset.npy", "datapoint_to_token.npy", "hashed_dataset.npy")
    own = {name: np.load(tmp_path / name) for name in names}
    other = tmp_path / "filled"
    other.mkdir()
    scann_index.write(other, *keys.shape, lambda start, stop: keys[start:stop], options)
    filled = {name: np.load(other / name) for name in names}
    assert all(own[name].dtype == filled[name].dtype for name in names)
    assert len(np.unique(own["datapoint_to_token.npy"])) > 50
    assert (own["datapoint_to_token.npy"] == filled["datapoint_to_token.npy"]).mean() > 0.999  # but for roundings
    np.testing.assert_array_equal(own["dataset.npy"], filled["dataset.npy"])
    np.testing.assert_array_equal(own["hashed_dataset.npy"], filled["hashed_dataset.npy"])


@needs_scann
def test_two_builds_in_two_processes_are_the_same_bytes(tmp_path):
    program = f"""
        import hashlib, pathlib, sys, tempfile
        import numpy as np
        from mlpmem_jax.retrieval import scann_index
        from mlpmem_jax.retrieval.scann_index import Options, ScannIndex
        # Keys on a coarse grid are often as near to two clusters: threads that race settle them differently.
        keys = np.round(4 * np.random.default_rng(0).normal(size=(100_000, {WIDTH}))).astype(np.float32)
        options = Options.derive(len(keys), 20, leaves=1000, training_sample=10_000)
        digest = hashlib.sha256()
        with tempfile.TemporaryDirectory() as folder:
            scann_index.write(folder, *keys.shape, lambda start, stop: keys[start:stop], options)
            for array in ScannIndex.load(folder, len(keys), options).search(keys[:300], 20):
                digest.update(array.tobytes())
            for file in sorted(pathlib.Path(folder).iterdir()):
                digest.update(file.read_bytes())
        print(digest.hexdigest())
    """
    outputs = [
        subprocess.run(
            [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=True, text=True
        ).stdout
        for _ in range(2)
    ]
    assert outputs[0] == outputs[1]


def test_merging_lists_is_one_sort_of_both():
    rng = np.random.default_rng(0)
    distances = rng.uniform(size=(4, 20)).astype(np.float32)
    values = rng.integers(100, size=(4, 20)).astype(np.int32)
    halves = [
        neighbors.smallest(neighbors.pack(distances[:, part], values[:, part]), 10)
        for part in np.split(np.arange(20), 2)
    ]
    found_distances, found_values = neighbors.unpack(neighbors.merge(*halves))
    order = np.argsort(distances, axis=1)[:, :10]
    np.testing.assert_array_equal(found_distances, np.take_along_axis(distances, order, axis=1))
    np.testing.assert_array_equal(found_values, np.take_along_axis(values, order, axis=1))


def test_distances_rounded_below_zero_are_the_nearest():
    """Negative numbers' bits order behind infinity: duplicates in another shard of keys would be lost."""
    distances = np.array([[2.0, -1e-7, np.inf, -0.0, 1.0]], np.float32)
    packed = neighbors.pack(distances, np.arange(5, dtype=np.int32)[None])
    found_distances, found = neighbors.unpack(neighbors.smallest(packed, 5))
    assert found.tolist() == [[1, 3, 4, 0, neighbors.MISSING]]
    assert found_distances.tolist() == [[0.0, 0.0, 1.0, 2.0, np.inf]]
