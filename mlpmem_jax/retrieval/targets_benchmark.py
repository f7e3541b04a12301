"""Rates of building targets on this machine, compared with the reference implementation.

Conditions: 764,000 keys of width 128, 1,024 neighbors, excluding the query itself, ending in sparse distributions. The
keys are sampled from a mixture of nested clusters, about as hard to search as the keys of a small language model; real
keys are measured too if the config's working directory has a datastore.
"""

from __future__ import annotations

import time

import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import host
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.errors import UserError, require
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval import exact_backend, quality, reduction, scann_backend, tiles
from mlpmem_jax.retrieval.backends import KeySource
from mlpmem_jax.retrieval.chunks import in_chunks
from mlpmem_jax.retrieval.distribution import SparseDistributions
from mlpmem_jax.retrieval.key_shards import KeyShard
from mlpmem_jax.retrieval.queries import Queries
from mlpmem_jax.retrieval.scann_backend import ScannIndex
from mlpmem_jax.retrieval.scann_index import Options

KEYS, WIDTH, NEIGHBORS, VOCABULARY = 764_000, 128, 1024, 50_257
POSITIONS, RECALL_POSITIONS = 16_384, 512
MINIMUM_PROBABILITY = 1e-8
_TRAINED_ON_PER_LIST = 39  # training keys per list; FAISS warns if there are fewer


def clustered_keys(count: int, width: int) -> np.ndarray:
    """float32 [count, width]: three levels of nested clusters with Zipf-distributed sizes and a descending spectrum."""
    random = np.random.default_rng(0)
    spectrum_D = (np.arange(1, width + 1) ** -0.25).astype(np.float32)
    keys_NxD = random.standard_normal((count, width), dtype=np.float32)
    keys_NxD *= spectrum_D
    cluster_N = np.zeros(count, np.int64)
    for branches, spread in ((60, 1.0), (40, 0.8), (40, 0.8)):
        shares = 1 / np.arange(1, branches + 1)
        cluster_N = cluster_N * branches + random.choice(branches, size=count, p=shares / shares.sum())
        _, cluster_N = np.unique(cluster_N, return_inverse=True)
        centers_UxD = random.standard_normal((cluster_N.max() + 1, width), dtype=np.float32) * spectrum_D * spread
        for start in range(0, count, 1 << 16):
            part = slice(start, start + (1 << 16))
            keys_NxD[part] += centers_UxD[cluster_N[part]]
    return keys_NxD


def _workload(keys_NxD: np.ndarray, next_tokens_N: np.ndarray) -> Queries:
    """Queries at consecutive positions from the middle of the keys."""
    first = max(0, (len(keys_NxD) - POSITIONS) // 2)
    part = slice(first, min(first + POSITIONS, len(keys_NxD)))
    positions_Q = np.arange(part.start, part.stop)
    return Queries(keys_NxD[part], next_tokens_N[part], positions_Q, np.zeros(len(positions_Q), np.int32))


def _truth(keys_NxD: np.ndarray, queries: Queries, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices of some sampled queries, and the ids of their exact neighbors."""
    chosen = np.linspace(0, len(queries) - 1, RECALL_POSITIONS).astype(int)
    own_Q = queries.positions_Q[chosen]
    excluded_Qx2 = np.stack([own_Q, own_Q + 1], axis=1)
    source = KeySource(*keys_NxD.shape, keys_NxD.dtype, lambda start, stop: keys_NxD[start:stop])
    return chosen, exact_backend.search_in_blocks(source, None, queries.keys_QxD[chosen], k, excluded_Qx2)[1]


def _own_rows(name: str, keys_NxD, next_tokens_N, queries: Queries, truth, k: int, options: dict) -> list[dict]:
    """This package's rates, measured on the code of the stage."""
    chosen, true_ids = truth
    derived = Options.derive(len(keys_NxD), k, **options)
    start = time.perf_counter()
    projection = reduction.fit(keys_NxD[:: max(1, len(keys_NxD) // derived.training_sample)], keys_NxD.shape[1])
    index = reduction.RotatedIndex(ScannIndex.build(projection(keys_NxD), derived), projection)
    built = time.perf_counter() - start
    shard = KeyShard(0, next_tokens_N, np.zeros(len(next_tokens_N), np.int32), index)
    distances_QxK, ids_QxK = index.search(queries.keys_QxD[chosen], k, shard.excluded(queries, "self")[chosen])
    recall = quality.contains(ids_QxK, true_ids).mean()
    settings = tiles.TargetSettings(
        k, "self", 0, MINIMUM_PROBABILITY, temperature=0.15 * float(np.median(distances_QxK))
    )

    def nearest(part: slice) -> np.ndarray:
        return settings.nearest(shard, queries[part], "train")

    def distributions(part: slice) -> SparseDistributions:
        return settings.distributions(nearest(part), queries[part])

    searching = time.process_time()
    in_chunks(nearest, len(queries), k)
    searching = time.process_time() - searching
    start, cpu = time.perf_counter(), time.process_time()
    parts = in_chunks(distributions, len(queries), k)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    entries = sum(len(part.token_ids_M) for part in parts) / len(queries)
    return [
        row(
            f"targets, {name}",
            len(queries) / seconds,
            "positions/s",
            f"recall@{k} {recall:.3f}; {len(keys_NxD):,} keys of width {keys_NxD.shape[1]}, ScaNN with "
            f"{derived.leaves_to_search} of {derived.leaves} leaves searched, {derived.reorder:.2f} x {k} reordered; "
            f"{entries:.0f} entries per position; {1e6 * cpu / len(queries):.0f} us of CPU time per position, "
            f"{1e6 * searching / len(queries):.0f} of them for the search",
        ),
        row(f"targets, {name}: index", built, "s", f"to train and fill, on {host.cpu_count()} cores"),
    ]


def reference_index(keys_NxD: np.ndarray):
    """FAISS's index with the reference implementation's settings, but fewer lists if there are few keys.

    Args:
      keys_NxD: float32 [N, D].

    Returns:
      (the index, its settings in words).

    Raises:
      UserError: FAISS is not installed.
    """
    faiss = require("faiss", extra="bench")
    width = keys_NxD.shape[1]
    lists = max(1, min(4096, len(keys_NxD) // _TRAINED_ON_PER_LIST))
    code_bytes = max(size for size in range(1, 65) if width % size == 0)
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(width), width, lists, code_bytes, 8)
    index.train(keys_NxD[:: max(1, len(keys_NxD) // (_TRAINED_ON_PER_LIST * lists))])
    index.add(keys_NxD)
    index.nprobe = min(32, lists)
    return index, f"FAISS IVFPQ, {lists:,} lists, {index.nprobe} probed, {code_bytes}-byte codes"


def _reference_rows(keys_NxD, next_tokens_N, queries: Queries, truth, k: int) -> list[dict]:
    """The reference implementation's method: FAISS IVFPQ, dropping the first result, then a dense row and a loop.

    Raises:
      UserError: FAISS is not installed.
    """
    chosen, true_ids = truth
    start = time.perf_counter()
    index, described = reference_index(keys_NxD)
    built = time.perf_counter() - start
    sampled_distances_QxK, sampled_ids_QxK = (
        array_QxK1[:, 1:] for array_QxK1 in index.search(queries.keys_QxD[chosen], k + 1)
    )
    temperature = 0.15 * float(np.median(sampled_distances_QxK))
    queries = queries[: min(4096, len(queries))]

    start, cpu = time.perf_counter(), time.process_time()
    distances_QxK, ids_QxK = (array_QxK1[:, 1:] for array_QxK1 in index.search(queries.keys_QxD, k + 1))
    sparse = []
    for distances_K, ids_K in zip(distances_QxK, ids_QxK, strict=True):
        weights_K = np.exp((distances_K[0] - distances_K) / temperature)
        dense_V = np.zeros(VOCABULARY, np.float32)
        np.add.at(dense_V, next_tokens_N[ids_K], weights_K / weights_K.sum())
        tokens = np.flatnonzero(dense_V > MINIMUM_PROBABILITY)
        sparse.append((tokens.astype(np.int32), dense_V[tokens].astype(np.float16)))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return [
        row(
            "targets, the reference's way",
            len(sparse) / seconds,
            "positions/s",
            f"recall@{k} {quality.contains(sampled_ids_QxK, true_ids).mean():.3f}; {described}, then "
            f"a dense row of {VOCABULARY:,} and a loop; the same {len(keys_NxD):,} keys; "
            f"{1e6 * cpu / len(sparse):.0f} us of CPU time per position",
        ),
        row("targets, the reference's way: index", built, "s", f"to train and fill, on {host.cpu_count()} cores"),
    ]


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail). Rows of ScaNN and FAISS need those to be installed."""
    if reason := scann_backend.unavailable():
        say(f"targets: no rows: ScaNN {reason}")
        return []
    random = np.random.default_rng(1)
    keys_NxD = clustered_keys(KEYS, WIDTH)
    next_tokens_N = (random.zipf(1.3, KEYS) % VOCABULARY).astype(np.int32)
    queries = _workload(keys_NxD, next_tokens_N)
    truth = _truth(keys_NxD, queries, NEIGHBORS)
    measured = _own_rows("clustered keys", keys_NxD, next_tokens_N, queries, truth, NEIGHBORS, {})
    try:
        measured += _reference_rows(keys_NxD, next_tokens_N, queries, truth, NEIGHBORS)
    except UserError as error:
        say(f"targets: the reference's row is left out: {error}")
    del keys_NxD, queries

    folder = epath.Path(config.workdir) / "datastore" / "train"
    if folder.exists():
        datastore = open_artifact(folder, "datastore")
        sequences = datastore.arrays["next_tokens"].shape[0]
        keys_SxTxD = datastore.read("keys", 0, sequences)
        keys_NxD = keys_SxTxD.reshape(-1, keys_SxTxD.shape[-1]).astype(np.float32)
        next_tokens_N = datastore.read("next_tokens", 0, sequences).ravel()
        queries = _workload(keys_NxD, next_tokens_N)
        for k in sorted({config.targets.k, NEIGHBORS}):
            truth = _truth(keys_NxD, queries, k)
            options = {
                name: config.targets[name] for name in ("leaves", "leaves_to_search", "reorder", "training_sample")
            }
            measured += _own_rows(f"keys of {folder}, k {k}", keys_NxD, next_tokens_N, queries, truth, k, options)
    return measured
