"""The exact search that never holds all keys, against brute force in float64."""

import numpy as np
import pytest
from retrieval_data import WIDTH, brute_force, forbidden, mixture

from mlpmem_jax.retrieval import exact_backend, neighbors
from mlpmem_jax.retrieval.backends import KeySource


def search(keys_NxD, queries_QxD, k, excluded_Qx2):
    source = KeySource(*keys_NxD.shape, np.dtype("float32"), lambda start, stop: keys_NxD[start:stop])
    return exact_backend.search_in_blocks(source, None, queries_QxD, k, excluded_Qx2)


@pytest.mark.parametrize("k", [1, 5, 70])
@pytest.mark.parametrize("block", [1 << 20, 128])
def test_it_agrees_with_brute_force(k, block, monkeypatch):
    monkeypatch.setattr(exact_backend, "_BLOCK_BYTES", 4 * WIDTH * block)
    keys = mixture(np.random.default_rng(0), 500, clusters=60).astype(np.float32)
    excluded = np.stack([np.arange(100, 140), np.arange(101, 141)], axis=1)
    distances, ids = search(keys, keys[100:140], k, excluded)
    true_distances, true_ids = brute_force(keys[100:140], keys, k, forbidden(excluded, 500))
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(distances, true_distances, rtol=1e-4, atol=1e-5)


def test_of_equal_distances_the_smaller_ids_are_taken(monkeypatch):
    monkeypatch.setattr(exact_backend, "_BLOCK_BYTES", 4 * WIDTH * 300)
    rng = np.random.default_rng(2)
    keys = rng.integers(-3, 4, size=(20, WIDTH))[rng.integers(20, size=2000)].astype(np.float32)
    distances, ids = search(keys, keys[:30], 40, np.zeros((30, 2), int))
    true_distances, true_ids = brute_force(keys[:30], keys, 40)
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(distances, true_distances)


def test_fewer_keys_than_k_leave_places_missing():
    keys = mixture(np.random.default_rng(0), 6).astype(np.float32)
    distances, ids = search(keys, keys[:2], 8, np.array([[0, 1], [0, 4]]))
    assert np.isfinite(distances).sum(axis=1).tolist() == [5, 2]
    assert (ids[np.isinf(distances)] == neighbors.MISSING).all()
    assert sorted(ids[1, :2].tolist()) == [4, 5]


def test_no_more_than_a_block_of_keys_is_read_at_once(monkeypatch):
    monkeypatch.setattr(exact_backend, "_BLOCK_BYTES", 4 * WIDTH * 128)
    keys, sizes = mixture(np.random.default_rng(0), 500).astype(np.float32), []

    def read(start, stop):
        sizes.append(stop - start)
        return keys[start:stop]

    source = KeySource(*keys.shape, np.dtype("float32"), read)
    exact_backend.search_in_blocks(source, None, keys[:3], 2, np.zeros((3, 2), int))
    assert max(sizes) <= 128
    assert sum(sizes) == 500
