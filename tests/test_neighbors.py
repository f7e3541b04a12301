import numpy as np

from mlpmem_jax.retrieval import neighbors


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
    found_distances, actual = neighbors.unpack(neighbors.smallest(packed, 5))
    assert actual.tolist() == [[1, 3, 4, 0, neighbors.MISSING]]
    assert found_distances.tolist() == [[0.0, 0.0, 1.0, 2.0, np.inf]]
