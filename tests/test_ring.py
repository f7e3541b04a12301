"""Search over eight virtual devices against brute force in float64."""

import functools
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from retrieval_data import brute_force, exact_index, forbidden, mixture

from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.retrieval import neighbors, ring
from mlpmem_jax.retrieval.backends import KeySource
from mlpmem_jax.retrieval.exact_backend import ExactIndex

QUERIES = slice(100, 137)
SELF = np.stack([np.arange(100, 137), np.arange(101, 138)], axis=1)
DOCUMENT = np.tile([[90, 120]], (37, 1))


@pytest.fixture(scope="module")
def keys():
    return mixture(np.random.default_rng(0), 1003, clusters=30).astype(np.float32)  # no multiple of eight


index_of = functools.partial(exact_index, devices=8)


@pytest.mark.parametrize(
    ("shape", "k", "excluded", "scores_per_block"),
    [
        ((1, 8, 1), 1, SELF, 1 << 26),
        ((1, 8, 1), 20, DOCUMENT, 1 << 26),
        ((2, 2, 2), 300, SELF, 1 << 26),  # more than a device has
        ((1, 8, 1), 5, SELF, 1024),  # a device's keys in several blocks
    ],
)
def test_it_agrees_with_brute_force(keys, shape, k, excluded, scores_per_block, monkeypatch):
    monkeypatch.setattr(ring, "SCORES_PER_BLOCK", scores_per_block)
    distances, ids = index_of(keys, shape).search(keys[QUERIES], k, excluded)
    true_distances, true_ids = brute_force(keys[QUERIES], keys, k, forbidden(excluded, len(keys)))
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(distances, true_distances, atol=2e-5)


def test_groups_of_a_long_block_lose_nothing():
    keys = mixture(np.random.default_rng(1), 20_000, clusters=3).astype(np.float32)
    scores = ((keys[:5, None] - keys[None]) ** 2).sum(axis=2)
    actual, places = ring._select(jnp.asarray(scores[:, :19_968]), k=7, num_keys=20_000, recall_target=1.0)
    np.testing.assert_array_equal(np.asarray(places), np.argsort(scores[:, :19_968], axis=1)[:, :7])
    np.testing.assert_array_equal(np.asarray(actual), np.sort(scores[:, :19_968], axis=1)[:, :7])


def duplicated(count=1003, different=40):
    """Small whole numbers, every key many times: float32 has all distances exactly, most of them several times."""
    rng = np.random.default_rng(2)
    return rng.integers(-3, 4, size=(different, 8))[rng.integers(different, size=count)].astype(np.float32)


@pytest.mark.parametrize("k", [1, 30, 200])
@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("scores_per_block", [1 << 26, 1 << 12])
def test_of_equal_distances_the_smaller_ids_are_taken_on_every_mesh(devices, k, scores_per_block, monkeypatch):
    monkeypatch.setattr(ring, "SCORES_PER_BLOCK", scores_per_block)
    keys = duplicated()
    distances, ids = index_of(keys, devices=devices).search(keys[QUERIES], k, SELF)
    true_distances, true_ids = brute_force(keys[QUERIES], keys, k, forbidden(SELF, len(keys)))
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_array_equal(distances, true_distances)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_distances_have_the_same_bits_on_every_mesh(keys, dtype):
    keys = np.concatenate([keys, keys[::3]])  # rounded distances, and equal ones
    actual = [index_of(keys, devices=devices, dtype=dtype).search(keys[QUERIES], 50, SELF) for devices in (1, 2, 8)]
    for distances, ids in actual[1:]:
        np.testing.assert_array_equal(ids, actual[0][1])
        np.testing.assert_array_equal(distances.view(np.int32), actual[0][0].view(np.int32))
    distances, ids = actual[0]
    assert ((np.diff(distances) > 0) | ((np.diff(distances) == 0) & (np.diff(ids) > 0))).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keys_are_compared_in_float32(keys, dtype):
    rounded = np.asarray(jnp.asarray(keys, dtype).astype(jnp.float32))
    distances, ids = index_of(keys, dtype=dtype).search(keys[QUERIES], 20, SELF)
    true_distances, _ = brute_force(rounded[QUERIES], rounded, 20, forbidden(SELF, len(keys)))
    bound = 4e-6 * 2 * (rounded**2).sum(axis=1).max()
    np.testing.assert_allclose(distances, true_distances, atol=bound)
    own = ((rounded[ids] - rounded[QUERIES][:, None]).astype(float) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, own, atol=bound)


@pytest.mark.parametrize("num_keys", [8100, 8192, 100_000], ids=["a padded block", "one block", "several"])
def test_the_approximate_selection_finds_the_share_asked_for(num_keys):
    scores = np.random.default_rng(0).random((16, 8192), np.float32)
    actual, places = ring._select(jnp.asarray(scores), k=20, num_keys=num_keys, recall_target=0.9)
    np.testing.assert_array_equal(np.take_along_axis(scores, np.asarray(places), axis=1), actual)
    nearest = np.argsort(scores)[:, :20]
    assert np.mean([len(set(a) & set(b)) / 20 for a, b in zip(np.asarray(places), nearest, strict=True)]) >= 0.9


def test_cpus_select_exactly_whatever_recall_is_asked_for(keys):
    asked, exact = (index_of(keys, recall_target=target).search(keys[QUERIES], 20, SELF) for target in (0.9, 1.0))
    np.testing.assert_array_equal(asked, exact)


def test_fewer_keys_than_neighbors_or_devices():
    keys = mixture(np.random.default_rng(0), 6).astype(np.float32)
    distances, ids = index_of(keys).search(keys[:2], 8, np.array([[0, 1], [0, 4]]))
    assert np.isfinite(distances).sum(axis=1).tolist() == [5, 2]
    assert (ids[np.isinf(distances)] == neighbors.MISSING).all()
    assert sorted(ids[1, :2].tolist()) == [4, 5]
    assert index_of(keys).search(keys[:0], 8)[1].shape == (0, 8)


def test_each_key_is_read_once(keys):
    reads = []

    def read(start, stop):
        reads.append((start, stop))
        return keys[start:stop]

    ExactIndex(KeySource(*keys.shape, "float32", read), make_mesh(1, 8, 1))
    reads.sort()
    assert len(reads) == 8
    assert reads[0][0] == 0
    assert reads[-1][1] == len(keys)
    assert all(before[1] == after[0] for before, after in itertools.pairwise(reads))


def test_the_shapes_to_compile_are_those_that_run(keys):
    mesh = make_mesh(1, 8, 1)
    search, arguments = ring.program(mesh, len(keys), 64, keys.shape[1], 5, "float32")
    padded = arguments[0].shape[0]
    keys_NxD = np.pad(keys, ((0, padded - len(keys)), (0, 0)))
    norms_N = np.where(np.arange(padded) < len(keys), (keys_NxD**2).sum(axis=1), np.inf).astype(np.float32)
    _, ids = search.lower(*arguments).compile()(keys_NxD, norms_N, keys[:64], np.zeros((64, 2), np.int32))
    np.testing.assert_array_equal(np.asarray(ids), brute_force(keys[:64], keys, 5)[1])
