"""Approximate nearest neighbors with ScaNN: a tree of clusters, asymmetric hashing, exact reordering in float32.

Two builds from the same keys are the same, byte for byte. ScaNN does not promise that: it draws random seeds from the
operating system, so the clusters are seeded by k-means++; and threads that share the work of assigning keys to clusters
disagree about a few of them from run to run, so one thread builds. Searches may use any number.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math

import numpy as np

from mlpmem_jax.core.runtime import no_native_log
from mlpmem_jax.retrieval import neighbors

_BRUTE_FORCE_BELOW = 4096  # too few keys to cluster and hash well
# More than these of ScaNN's trainings made no difference to the recall.
_TREE_ITERATIONS, _HASHING_ITERATIONS, _HASHING_SAMPLE = 6, 5, 25_000
_SMALLEST_LEAF = 4  # of the sample; ScaNN's 50 dissolves leaves when the sample has fewer than about 100 keys a leaf
_ROWS_PER_CALL = 256
_RETRIED_NEIGHBORS = 1 << 22  # of one call: 32 MiB of ids and distances


def is_available() -> bool:
    """Whether ScaNN is installed; its wheels are for Linux on x86-64 alone."""
    return importlib.util.find_spec("scann") is not None


@dataclasses.dataclass(frozen=True)
class Options:
    """How the index is built and searched.

    Attributes:
      leaves: clusters that the keys are divided into.
      leaves_to_search: nearest clusters that each query looks into.
      reorder: candidates, for each neighbor wanted, whose distance is computed exactly.
      training_sample: keys that clusters and hashes are trained on.
    """

    leaves: int
    leaves_to_search: int
    reorder: float
    training_sample: int

    @classmethod
    def derive(cls, num_keys: int, k: int, leaves=0, leaves_to_search=0, reorder=0, training_sample=100_000):
        """Options from the number of keys and of neighbors; an argument that is not 0 stands as given.

        What is derived was measured to give a recall of 0.95 or more on the keys of small language models; keys that
        cluster less need more leaves searched.

        Args:
          num_keys: N.
          k: neighbors that will be asked for.
          leaves, leaves_to_search, training_sample: as the attributes.
          reorder: candidates whose distance is computed exactly when k neighbors are asked for.
        """
        leaves = min(leaves or round(math.sqrt(num_keys)), num_keys)
        # The ball that holds k neighbors touches more leaves as it grows, but fewer than in proportion.
        touched = math.ceil(40 * (k * leaves / num_keys) ** 0.4)
        return cls(
            leaves=leaves,
            leaves_to_search=min(leaves_to_search or touched, leaves),
            reorder=round(reorder / k if reorder else 1 + 9 / math.sqrt(k), 2),
            training_sample=min(training_sample, num_keys),
        )


class ScannIndex:
    """A ScaNN searcher over N keys. Make one with `build` or `load`."""

    def __init__(self, searcher, size: int, options: Options):
        self._searcher, self.size, self.options = searcher, size, options

    @classmethod
    def build(cls, keys_NxD: np.ndarray, options: Options) -> ScannIndex:
        """Trains clusters and hashes on `keys_NxD` (float32 [N, D]) and fills the index."""
        builder = _scann().builder(np.ascontiguousarray(keys_NxD, np.float32), 1, "squared_l2")
        if len(keys_NxD) < _BRUTE_FORCE_BELOW:
            builder = builder.score_brute_force()
        else:
            builder = builder.tree(
                options.leaves,
                options.leaves_to_search,
                training_sample_size=options.training_sample,
                training_iterations=_TREE_ITERATIONS,
                min_partition_size=_SMALLEST_LEAF,
                random_init=False,
            )
            # One dimension a block: more bytes to scan than two, far fewer candidates to reorder for the same recall.
            builder = builder.score_ah(
                1,
                training_sample_size=min(_HASHING_SAMPLE, options.training_sample),
                training_iterations=_HASHING_ITERATIONS,
            ).reorder(1)
        builder.set_n_training_threads(1)
        with no_native_log():
            return cls(builder.build(), len(keys_NxD), options)

    def save(self, folder) -> None:
        """Writes the index to an existing empty folder."""
        with no_native_log():
            self._searcher.serialize(str(folder), relative_path=True)

    @classmethod
    def load(cls, folder, size: int, options: Options) -> ScannIndex:
        """Reads what `save` wrote."""
        with no_native_log():
            return cls(_scann().load_searcher(str(folder)), size, options)

    def search(
        self, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """About the k nearest keys of each query.

        Args:
          queries_QxD: float32 [Q, D].
          k: neighbors wanted.
          excluded_Qx2: int [Q, 2]; of query q, keys with ids in [start, stop) are left out. None leaves none out.

        Returns:
          (squared distances float32 [Q, k], ids int32 [Q, k]), nearest first; where fewer than k were found, infinite
          distances and ids of -1. Other Python threads run meanwhile: call it from several to use several cores.
        """
        count = len(queries_QxD)
        if excluded_Qx2 is None:
            excluded_Qx2 = np.zeros((count, 2), np.int32)
        longest = int(np.max(excluded_Qx2[:, 1] - excluded_Qx2[:, 0], initial=0))
        distances_QxK = np.empty((count, k), np.float32)
        ids_QxK = np.empty((count, k), np.int32)
        rows, extra, leaves = np.arange(count), min(longest, max(1, k // 8)), self.options.leaves_to_search
        while True:
            step = max(1, min(_ROWS_PER_CALL, _RETRIED_NEIGHBORS // (k + extra)))
            for start in range(0, len(rows), step):
                part = rows[start : start + step]
                found = self._search_once(queries_QxD[part], k, extra, leaves, excluded_Qx2[part])
                distances_QxK[part], ids_QxK[part] = found
            rows = rows[np.isinf(distances_QxK[rows, -1])]
            if not len(rows) or (leaves == self.options.leaves and extra == longest):
                return distances_QxK, ids_QxK
            extra, leaves = min(longest, 4 * extra), min(self.options.leaves, 4 * leaves)

    def _search_once(self, queries_QxD, k: int, extra: int, leaves: int, excluded_Qx2):
        wanted = min(k + extra, self.size)
        ids_QxM, distances_QxM = self._searcher.search_batched(
            np.ascontiguousarray(queries_QxD, np.float32),
            final_num_neighbors=wanted,
            pre_reorder_num_neighbors=round(wanted * self.options.reorder),
            leaves_to_search=leaves,
        )
        ids_QxM = ids_QxM.view(np.int32)
        usable_QxM = np.isfinite(distances_QxM)  # ScaNN puts NaN in places that it could not fill
        usable_QxM &= (ids_QxM < excluded_Qx2[:, :1]) | (ids_QxM >= excluded_Qx2[:, 1:])
        usable_QxM &= np.cumsum(usable_QxM, axis=1, dtype=np.int32) <= k
        if np.count_nonzero(usable_QxM) == len(ids_QxM) * k:
            return distances_QxM[usable_QxM].reshape(-1, k), ids_QxM[usable_QxM].reshape(-1, k)
        padding = ((0, 0), (0, max(0, k - wanted)))
        distances_QxM = np.pad(np.where(usable_QxM, distances_QxM, np.inf), padding, constant_values=np.inf)
        packed_QxM = neighbors.pack(distances_QxM, np.pad(ids_QxM, padding))
        return neighbors.unpack(neighbors.smallest(packed_QxM, k))


def _scann():
    from scann import scann_ops_pybind  # here, because there is no wheel for every machine

    return scann_ops_pybind
