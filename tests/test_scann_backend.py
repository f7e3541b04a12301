import itertools

import numpy as np
import pytest
from numpy._core._multiarray_umath import __cpu_features__ as numpy_features
from retrieval_data import brute_force, forbidden, mixture

from mlpmem_jax.retrieval import neighbors, scann_backend, scann_index
from mlpmem_jax.retrieval.scann_backend import ScannIndex
from mlpmem_jax.retrieval.scann_index import Options

pytestmark = pytest.mark.skipif(bool(scann_backend.unavailable()), reason="ScaNN has no wheel for this machine")


@pytest.fixture(scope="module")
def keys():
    return mixture(np.random.default_rng(0), 6000, clusters=60).astype(np.float32)


@pytest.fixture(scope="module")
def index(keys):
    return ScannIndex.build(keys, Options.derive(len(keys), 20, leaves_to_search=20))


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


def test_instructions_are_those_that_numpy_sees():
    expected = {
        "avx2": numpy_features["AVX2"] and numpy_features["FMA3"],
        "avx512": numpy_features["AVX512_SKX"],
    }
    assert scann_index.available_instructions() == {name for name, has in expected.items() if has}


@pytest.mark.parametrize("width", [33, 300])  # sums of up to 256 hashes have 16 bits, of more 32
def test_every_set_of_instructions_finds_as_much(width):
    random = np.random.default_rng(1)
    centers_UxD = random.normal(size=(60, width))
    keys = (centers_UxD[random.integers(60, size=6000)] + 0.3 * random.normal(size=(6000, width))).astype(np.float32)
    _, true_ids = brute_force(keys[:200], keys, 20)
    available, found = scann_index.available_instructions(), []
    try:
        for names in itertools.accumulate([set(), *({name} for name in sorted(available))], set.union):
            scann_index.use_instructions(names)
            index = ScannIndex.build(keys, Options.derive(len(keys), 20, leaves_to_search=20))
            _, ids = index.search(keys[:200], 20)
            found.append(np.mean([len(set(a) & set(b)) / 20 for a, b in zip(ids, true_ids, strict=True)]))
    finally:
        scann_index.use_instructions(available)
    assert min(found) > 0.9
    np.testing.assert_allclose(found, found[0], atol=0.005)


def test_scann_asks_again_until_a_long_exclusion_is_passed(keys, index):
    # Everything near query 0 is excluded: what is left lies in other leaves.
    order = np.argsort(((keys - keys[0]) ** 2).sum(axis=1))
    sorted_keys = np.ascontiguousarray(keys[order])
    sorted_index = ScannIndex.build(sorted_keys, Options.derive(len(keys), 20))
    distances, ids = sorted_index.search(sorted_keys[:3], 20, np.array([[0, 3000], [0, 0], [10, 20]]))
    assert np.isfinite(distances).all()
    assert ids[0].min() >= 3000


def test_long_documents_are_passed_without_looking_harder(keys, index, monkeypatch):
    """A quarter of all keys is excluded: as many more neighbors are asked for as it takes, in no more leaves."""
    asked, leaves = [], []

    class Spy:
        def search_batched(self, queries_QxD, *, final_num_neighbors, leaves_to_search, **options):
            asked.append(len(queries_QxD) * final_num_neighbors)
            leaves.append(leaves_to_search)
            return searcher.search_batched(
                queries_QxD, final_num_neighbors=final_num_neighbors, leaves_to_search=leaves_to_search, **options
            )

    searcher = index._searcher
    monkeypatch.setattr(index, "_searcher", Spy())
    positions = np.arange(0, 6000, 40)
    excluded = np.stack([positions // 1500 * 1500, positions // 1500 * 1500 + 1500], axis=1)
    distances, ids = index.search(keys[positions], 20, excluded)
    _, true_ids = brute_force(keys[positions], keys, 20, forbidden(excluded, len(keys)))
    recall = np.mean([len(set(a) & set(b)) / 20 for a, b in zip(ids, true_ids, strict=True)])
    assert recall > 0.95
    assert np.isfinite(distances).all()
    assert sum(asked) < 3 * 20 * len(positions)
    assert set(leaves) == {20}


def test_scann_without_enough_keys_says_so():
    keys = mixture(np.random.default_rng(0), 30).astype(np.float32)
    distances, ids = ScannIndex.build(keys, Options.derive(30, 40)).search(keys, 40, np.tile([[0, 10]], (30, 1)))
    assert (np.isfinite(distances).sum(axis=1) == 20).all()
    assert (ids[np.isinf(distances)] == neighbors.MISSING).all()
