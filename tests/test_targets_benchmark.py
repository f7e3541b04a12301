import numpy as np
import pytest
from retrieval_data import config_for, write_workdir

from mlpmem_jax.retrieval import scann_backend, targets_benchmark


@pytest.mark.skipif(bool(scann_backend.unavailable()), reason="ScaNN has no wheel for this machine")
def test_rows_of_own_and_of_stored_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(targets_benchmark, "KEYS", 5000)
    monkeypatch.setattr(targets_benchmark, "WIDTH", 16)
    monkeypatch.setattr(targets_benchmark, "NEIGHBORS", 32)
    monkeypatch.setattr(targets_benchmark, "POSITIONS", 600)
    monkeypatch.setattr(targets_benchmark, "RECALL_POSITIONS", 50)
    monkeypatch.setattr(targets_benchmark, "_reference_rows", lambda *arguments: [])
    write_workdir(tmp_path)
    rows = targets_benchmark.rows(config_for(tmp_path))
    assert len(rows) == 6
    assert all(set(row) == {"name", "value", "unit", "detail"} and row["value"] > 0 for row in rows)
    assert [row["unit"] for row in rows] == ["positions/s", "s"] * 3
    assert "recall@12" in rows[2]["detail"]


def test_the_references_way_finds_neighbors(monkeypatch):
    monkeypatch.setattr(targets_benchmark, "POSITIONS", 100)
    monkeypatch.setattr(targets_benchmark, "RECALL_POSITIONS", 50)
    keys = targets_benchmark.clustered_keys(3000, 64)
    tokens = np.arange(3000, dtype=np.int32)
    queries = targets_benchmark._workload(keys, tokens)
    truth = targets_benchmark._truth(keys, queries, 16)
    rate, built = targets_benchmark._reference_rows(keys, tokens, queries, truth, 16)
    assert rate["value"] > 0
    assert built["value"] > 0
    assert float(rate["detail"].split(";")[0].split()[1]) > 0.5


def test_clustered_keys_are_the_same_each_time_and_cluster():
    keys = targets_benchmark.clustered_keys(4000, 8)
    np.testing.assert_array_equal(keys, targets_benchmark.clustered_keys(4000, 8))
    distances = ((keys[:200, None] - keys[None, :]) ** 2).sum(axis=2)
    assert np.median(np.partition(distances, 10, axis=1)[:, 10]) < 0.25 * np.median(distances)
