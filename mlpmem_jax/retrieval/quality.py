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


class Sample:
    """Queries of the training split with their true neighbors, to compare approximate searches with."""

    def __init__(self, key_shards: KeyShards, queries: Queries, exclude: str, k: int):
        """Searches all key shards exactly, in all dimensions.

        Args:
          key_shards: of the training split.
          queries: sampled from the training split.
          exclude, k: as the targets are made.
        """
        self._key_shards, self._queries, self._exclude, self._k = key_shards, queries, exclude, k
        self._true, packed_QxK = [], None
        for number in range(len(key_shards)):
            shard = key_shards.open(number)
            excluded_Qx2 = shard.excluded(queries, exclude)
            distances_QxK, ids_QxK = key_shards.exact_neighbors(number, queries.keys_QxD, k, excluded_Qx2)
            self._true.append((distances_QxK, ids_QxK))
            found_QxK = neighbors.pack(distances_QxK, shard.next_tokens_N[ids_QxK])
            packed_QxK = neighbors.merge(packed_QxK, found_QxK)
        self.packed_QxK = packed_QxK

    def search(self, shards: range | None = None) -> tuple[float, np.ndarray]:
        """Searches key shards (all, unless given) with their indices, as these are set to search now.

        Returns:
          (recall: the share of the k nearest of these shards that the search returns, meaned over the queries;
          the neighbors packed with their next tokens, uint64 [Q, k]).
        """
        was_found, packed_QxK = None, None
        for number in range(len(self._key_shards)) if shards is None else shards:
            shard = self._key_shards.open(number)
            excluded_Qx2 = shard.excluded(self._queries, self._exclude)
            distances_QxK, ids_QxK = shard.index.search(self._queries.keys_QxD, self._k, excluded_Qx2)
            true_distances_QxK, true_ids_QxK = self._true[number]
            found_QxK = contains(ids_QxK, true_ids_QxK).astype(np.int32)
            was_found = neighbors.merge(was_found, neighbors.pack(true_distances_QxK, found_QxK))
            tokens_QxK = shard.next_tokens_N[ids_QxK]
            packed_QxK = neighbors.merge(packed_QxK, neighbors.pack(distances_QxK, tokens_QxK))
        distances_QxK, found_QxK = neighbors.unpack(was_found)
        return float(found_QxK[np.isfinite(distances_QxK)].mean()), packed_QxK

    def total_variation(self, packed_QxK: np.ndarray, temperature: float) -> float:
        """Half the L1 distance of p_kNN of these neighbors to that of the true ones, meaned over the queries."""
        found, true = (
            sparse_distributions(*neighbors.unpack(packed), self._queries.next_tokens_Q, temperature)
            for packed in (packed_QxK, self.packed_QxK)
        )
        return float(total_variation(found, true).mean())
