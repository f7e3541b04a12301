"""How good an approximate search is: its recall, and how far the distributions made from it are from the exact ones."""

from __future__ import annotations

import numpy as np

from mlpmem_jax.retrieval import neighbors
from mlpmem_jax.retrieval.distribution import sparse_distributions, total_variation
from mlpmem_jax.retrieval.key_shards import KeyShards, Queries


def contains(ids_QxK: np.ndarray, wanted_QxK: np.ndarray) -> np.ndarray:
    """Row by row, which of `wanted_QxK` are among `ids_QxK`: bool [Q, K]."""
    stride = 1 + int(max(ids_QxK.max(initial=0), wanted_QxK.max(initial=0)))
    offsets_Qx1 = np.arange(len(ids_QxK))[:, None] * stride
    found_QxK = np.isin(wanted_QxK + offsets_Qx1, (ids_QxK + offsets_Qx1)[ids_QxK != neighbors.MISSING])
    return found_QxK & (wanted_QxK != neighbors.MISSING)


def measure(key_shards: KeyShards, queries: Queries, exclude: str, k: int, temperature: float) -> dict[str, float]:
    """Compares the indices of all key shards with exact search in all dimensions.

    Args:
      key_shards: of the training split.
      queries: sampled from the training split.
      exclude, k, temperature: as the targets are made.

    Returns:
      `recall_at_k`, the share of the k nearest neighbors that the approximate search returns, and `total_variation`,
      half the L1 distance between approximate and exact p_kNN, each the mean over the queries.
    """
    was_found, approximate, exact = None, None, None
    for number in range(len(key_shards)):
        shard = key_shards.open(number)
        excluded_Qx2 = shard.excluded(queries, exclude)
        distances_QxK, ids_QxK = shard.index.search(queries.keys_QxD, k, excluded_Qx2)
        true_distances_QxK, true_ids_QxK = key_shards.exact_neighbors(number, queries.keys_QxD, k, excluded_Qx2)
        found_QxK = contains(ids_QxK, true_ids_QxK).astype(np.int32)
        was_found = neighbors.merge(was_found, neighbors.pack(true_distances_QxK, found_QxK))
        tokens = shard.next_tokens_N
        approximate = neighbors.merge(approximate, neighbors.pack(distances_QxK, tokens[ids_QxK]))
        exact = neighbors.merge(exact, neighbors.pack(true_distances_QxK, tokens[true_ids_QxK]))

    distances_QxK, found_QxK = neighbors.unpack(was_found)
    left, right = (
        sparse_distributions(*neighbors.unpack(packed), queries.next_tokens_Q, temperature)
        for packed in (approximate, exact)
    )
    return {
        "recall_at_k": float(found_QxK[np.isfinite(distances_QxK)].mean()),
        "total_variation": float(total_variation(left, right).mean()),
    }
