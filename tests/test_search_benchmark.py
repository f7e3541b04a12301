import types

import numpy as np
from retrieval_data import config_for, write_workdir

from mlpmem_jax.retrieval import scann_backend, search_benchmark


def test_rows_on_stored_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(search_benchmark, "KEYS", 400)  # of 640
    monkeypatch.setattr(search_benchmark, "RECALL_POSITIONS", 64)
    monkeypatch.setattr(search_benchmark, "_reference_row", lambda sample, timed, effort: {"name": "reference"})
    write_workdir(tmp_path)
    rows = search_benchmark.rows(config_for(tmp_path))
    assert rows.pop() == {"name": "reference"}
    recalls = {row["name"]: float(row["detail"].split()[1].rstrip(";,")) for row in rows}
    assert recalls["search, exact, 8 of 8 dimensions"] == 1
    assert 1 > recalls["search, exact, 4 of 8 dimensions"] > recalls["search, exact, 2 of 8 dimensions"] > 0
    assert len(recalls) == (3 if scann_backend.unavailable() else 6)
    assert all(row["value"] > 0 and "; 320 keys;" in row["detail"] for row in rows)


def test_the_reference_is_compared_on_the_same_neighbors(monkeypatch):
    """FAISS's place is taken by a brute force, whose recall is 1."""
    random = np.random.default_rng(0)
    keys = random.standard_normal((500, 8)).astype(np.float32)

    class BruteForce:
        def search(self, queries_QxD, k):
            distances = ((queries_QxD[:, None] - keys[None]) ** 2).sum(axis=2)
            return None, np.argsort(distances, axis=1)[:, :k]

    from mlpmem_jax.retrieval.backends import KeySource
    from mlpmem_jax.retrieval.exact_backend import search_in_blocks
    from mlpmem_jax.retrieval.key_shards import KeyShard, KeyShards
    from mlpmem_jax.retrieval.quality import Sample
    from mlpmem_jax.retrieval.queries import Queries

    monkeypatch.setattr(search_benchmark, "reference_index", lambda keys_NxD: (BruteForce(), "brute force"))
    positions = np.arange(100, 150)
    queries = Queries(keys[positions], positions, positions, positions)
    source = KeySource(500, 8, np.dtype("float32"), lambda start, stop: keys[start:stop])
    truth = search_in_blocks(source, None, queries.keys_QxD, 5, np.stack([positions, positions + 1], axis=1))

    class Shards:
        search = types.SimpleNamespace(backend=types.SimpleNamespace(is_collective=False))
        search_shard = KeyShards.search_shard

        def keys(self, shard):
            return source

        def open(self, shard):
            return KeyShard(0, np.zeros(500, np.int32), np.arange(500), Index())

    searched = []

    class Index:
        def search(self, queries_QxD, k, excluded_Qx2, effort):
            searched.append((k, effort, *excluded_Qx2[0]))
            return np.zeros((len(queries_QxD), k), np.float32), np.zeros((len(queries_QxD), k), np.int32)

    sample = Sample(Shards(), queries, "self", 5, [truth], None)
    row = search_benchmark._reference_row(sample, queries, "an effort")
    assert row["detail"].startswith("recall@5 1.000 with brute force; 500 keys")
    assert "times its rate, median of 7 rounds" in row["detail"]
    assert searched == [(5, "an effort", 100, 101)] * 8  # one call warms up
