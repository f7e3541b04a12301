"""The quality of an approximate search: its recall, and how far its distributions are from the exact ones."""

from __future__ import annotations

import dataclasses

import numpy as np

from mlpmem_jax.retrieval import neighbors
from mlpmem_jax.retrieval.backends import Effort
from mlpmem_jax.retrieval.distribution import sparse_distributions, total_variation
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.queries import Queries
from mlpmem_jax.retrieval.scratch import Measurements

_NOT_KEPT = Measurements()


def contains(ids_QxK: np.ndarray, wanted_QxK: np.ndarray) -> np.ndarray:
    """For each row, which of `wanted_QxK` are among `ids_QxK`: bool [Q, K]."""
    stride = 1 + int(max(ids_QxK.max(initial=0), wanted_QxK.max(initial=0)))
    offsets_Qx1 = np.arange(len(ids_QxK))[:, None] * stride
    is_there_QxK = np.isin(wanted_QxK + offsets_Qx1, (ids_QxK + offsets_Qx1)[ids_QxK != neighbors.MISSING])
    return is_there_QxK & (wanted_QxK != neighbors.MISSING)


def named(effort: Effort | None) -> str:
    """A name of the effort for files of measurements."""
    return ",".join(f"{name}={value}" for name, value in effort.summary().items()) if effort else "one effort"


@dataclasses.dataclass(frozen=True)
class Sample:
    """Queries of the training split with their true neighbors, for evaluating approximate searches.

    Attributes:
      key_shards: the key shards of the training split.
      queries: Q of its positions.
      exclude, k: as for the targets.
      true_neighbors: (squared distances float32 [Q, k], ids int32 [Q, k]) in each key shard.
      packed_QxK: the k nearest over all shards with their next tokens, packed by `neighbors.pack`.
      measurements: what is kept of this and of searches.
    """

    key_shards: KeyShards
    queries: Queries
    exclude: str
    k: int
    true_neighbors: list[tuple[np.ndarray, np.ndarray]]
    packed_QxK: np.ndarray
    measurements: Measurements = _NOT_KEPT

    @classmethod
    def draw(
        cls, key_shards: KeyShards, queries: Queries, exclude: str, k: int, measurements: Measurements = _NOT_KEPT
    ) -> Sample:
        """Searches all key shards exactly, in all dimensions, for the true neighbors; opens no index."""

        def measure(number: int) -> np.ndarray:
            positions = key_shards.positions(number)
            excluded_Qx2 = positions.excluded(queries, exclude)
            distances_QxK, ids_QxK = key_shards.exact_neighbors(number, queries.keys_QxD, k, excluded_Qx2)
            return np.stack([neighbors.pack(distances_QxK, ids_QxK), positions.packed(distances_QxK, ids_QxK)])

        true_neighbors, packed_QxK = [], None
        for ids_QxK, nearest_QxK in measurements.of_shards("exact", range(len(key_shards)), measure):
            true_neighbors.append(neighbors.unpack(ids_QxK))
            packed_QxK = neighbors.merge(packed_QxK, nearest_QxK)
        return cls(key_shards, queries, exclude, k, true_neighbors, packed_QxK, measurements)

    def search(self, effort: Effort | None = None, shards: range | None = None) -> tuple[float, np.ndarray]:
        """Searches key shards (all, unless given) with their indices.

        Returns:
          (recall: the share of these shards' k nearest that the search returns, averaged over the queries;
          the neighbors packed with their next tokens, uint64 [Q, k]).
        """

        def measure(number: int) -> np.ndarray:
            distances_QxK, ids_QxK = self.key_shards.search_shard(number, self.queries, self.k, self.exclude, effort)
            true_distances_QxK, true_ids_QxK = self.true_neighbors[number]
            is_returned_QxK = contains(ids_QxK, true_ids_QxK).astype(np.int32)
            nearest_QxK = self.key_shards.open(number).packed(distances_QxK, ids_QxK)
            return np.stack([neighbors.pack(true_distances_QxK, is_returned_QxK), nearest_QxK])

        truth_QxK, packed_QxK = None, None
        shards = range(len(self.key_shards)) if shards is None else shards
        for in_shard_QxK, nearest_QxK in self.measurements.of_shards(f"search,{named(effort)}", shards, measure):
            truth_QxK = neighbors.merge(truth_QxK, in_shard_QxK)
            packed_QxK = neighbors.merge(packed_QxK, nearest_QxK)
        distances_QxK, is_returned_QxK = neighbors.unpack(truth_QxK)
        return float(is_returned_QxK[np.isfinite(distances_QxK)].mean()), packed_QxK

    def total_variation(self, packed_QxK: np.ndarray, temperature: float) -> float:
        """The total variation between p_kNN of these neighbors and of the true ones, averaged over the queries."""
        approximate, exact = (
            sparse_distributions(*neighbors.unpack(packed), self.queries.next_tokens_Q, temperature)
            for packed in (packed_QxK, self.packed_QxK)
        )
        return float(total_variation(approximate, exact).mean())
