import numpy as np
import pytest
from etils import epath
from retrieval_data import WIDTH, brute_force, config_for, exact_index, forbidden, write_workdir

from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.config import check_config
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.retrieval import exact_backend, neighbors, reduction, targets
from mlpmem_jax.retrieval.key_shards import KeyShards, Search


@pytest.fixture(scope="module")
def keys():
    """400 keys in 24 dimensions that vary in six of them, and a little in the rest."""
    rng = np.random.default_rng(0)
    inner = rng.normal(size=(400, 6)) * np.arange(6, 0, -1)
    return (inner @ rng.normal(size=(6, 24)) + 0.01 * rng.normal(size=(400, 24)) + 5).astype(np.float32)


def test_components_are_those_of_the_singular_value_decomposition(keys):
    projection = reduction.fit(keys, 6)
    centered = keys.astype(float) - keys.astype(float).mean(axis=0)
    _, values, rows = np.linalg.svd(centered, full_matrices=False)
    expected = centered @ rows[:6].T
    actual = projection(keys)
    # The same points but for a rotation: all inner products agree.
    np.testing.assert_allclose(actual @ actual.T, expected @ expected.T, atol=5e-2)
    assert projection.variance_kept == pytest.approx((values[:6] ** 2).sum() / (values**2).sum(), abs=1e-5)
    assert 0.99 < projection.variance_kept < 1


def test_all_dimensions_are_rotated_and_distances_kept(keys):
    projection = reduction.fit(keys, keys.shape[1])
    actual = projection(keys)
    np.testing.assert_allclose(projection.basis_DxO.T @ projection.basis_DxO, np.eye(24), atol=1e-6)
    np.testing.assert_allclose(actual.mean(axis=0), 0, atol=1e-3)
    truth = ((keys[:, None] - keys[None, :50]) ** 2).sum(axis=2)
    np.testing.assert_allclose(((actual[:, None] - actual[None, :50]) ** 2).sum(axis=2), truth, rtol=1e-4, atol=1e-4)
    assert projection.variance_kept == 1


def test_a_saved_projection_is_the_same(keys, tmp_path):
    projection = reduction.fit(keys, 4)
    projection.save(epath.Path(tmp_path) / "projection.npy")
    again = reduction.Projection.load(epath.Path(tmp_path) / "projection.npy")
    np.testing.assert_array_equal(again(keys), projection(keys))
    assert again.variance_kept == projection.variance_kept


def test_distances_are_those_of_all_dimensions(keys):
    projection = reduction.fit(keys, 3)
    index = reduction.ReducedIndex(exact_index(projection(keys)), projection, keys.astype(np.float16))
    queries = keys[:90].astype(np.float16).astype(np.float32)
    excluded = np.stack([np.arange(90), np.arange(1, 91)], axis=1)
    distances, ids = index.search(queries, 10, excluded)
    assert not (ids == np.arange(90)[:, None]).any()
    truth = ((keys.astype(np.float16)[ids].astype(float) - queries[:, None]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, truth, rtol=1e-5)
    assert (np.diff(distances, axis=1) >= 0).all()
    # With the six dimensions that matter the neighbors are the true ones as well.
    projection = reduction.fit(keys, 6)
    index = reduction.ReducedIndex(exact_index(projection(keys)), projection, keys)
    _, true_ids = brute_force(keys[:90], keys, 10, forbidden(excluded, len(keys)))
    np.testing.assert_array_equal(index.search(keys[:90], 10, excluded)[1], true_ids)


def test_every_finite_half_is_widened_exactly():
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halves = halves[np.isfinite(halves)].reshape(-1, 2)
    np.testing.assert_array_equal(reduction.widened(halves).view(np.uint32), halves.astype(np.float32).view(np.uint32))


def test_a_query_with_too_few_neighbors_says_so(keys):
    projection = reduction.fit(keys, 6)
    index = reduction.ReducedIndex(exact_index(projection(keys[:9])), projection, keys[:9])
    distances, ids = index.search(keys[:2], 8, np.array([[0, 4], [0, 0]]))
    assert np.isfinite(distances).sum(axis=1).tolist() == [5, 8]
    assert (ids[0, 5:] == neighbors.MISSING).all()


@pytest.mark.parametrize("backend", ["auto", "exact"])
def test_targets_record_what_fewer_dimensions_cost(tmp_path, backend):
    write_workdir(tmp_path)
    with pytest.raises(UserError, match=r"recall: expected 0.95, .*set config.targets.recall to 0\.\d+"):
        targets.run(config_for(tmp_path, backend=backend, search_dimensions=2))
    assert not list(tmp_path.glob("targets/*/shards/*"))
    artifact = targets.run(config_for(tmp_path, backend=backend, search_dimensions=2, recall=0.3))["train"]
    assert 0.2 < artifact.summary["search_variance_kept"] < 1
    assert 0.3 < artifact.summary["recall_at_k"] < 1
    assert 0 < artifact.summary["total_variation"] < 0.7
    assert artifact.config["search_dimensions"] == 2


def test_an_exact_search_in_blocks_is_exact(tmp_path, monkeypatch):
    arrays = write_workdir(tmp_path)["train"]
    monkeypatch.setattr(exact_backend, "_BLOCK_BYTES", 37 * 2 * WIDTH)
    datastore = open_artifact(tmp_path / "datastore" / "train", "datastore")
    search = Search.create(exact_backend.Backend, {"k": 12})
    shards = KeyShards.prepare(datastore, 10**6, epath.Path(tmp_path), search)
    keys = arrays["keys"].reshape(-1, WIDTH).astype(np.float32)
    excluded = np.stack([np.arange(50), np.arange(9, 59)], axis=1)
    distances, ids = shards.exact_neighbors(0, keys[:50], 12, excluded)
    true_distances, true_ids = brute_force(keys[:50], keys, 12, forbidden(excluded, len(keys)))
    np.testing.assert_array_equal(ids, true_ids)
    np.testing.assert_allclose(distances, true_distances, rtol=1e-4)
    np.testing.assert_array_equal(shards.keys(0).read(13, 300).astype(np.float32), keys[13:300])


def test_what_does_not_suit_the_keys_is_refused_before_anything_is_written(tmp_path):
    write_workdir(tmp_path)
    with pytest.raises(ConfigError, match=r"search_dimensions: expected fewer than the 64 dimensions of the keys"):
        check_config(config_for(tmp_path, search_dimensions=64))
    with pytest.raises(ConfigError, match=r"search_dimensions: expected fewer than the 8 dimensions"):
        targets.run(config_for(tmp_path, search_dimensions=8))
    with pytest.raises(ConfigError, match=r"search_dimensions: 5 cannot be fitted on a sample of 4 keys"):
        targets.run(config_for(tmp_path, search_dimensions=5, training_sample=4))
    assert not (tmp_path / "targets").exists()
