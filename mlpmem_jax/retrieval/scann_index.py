"""Approximate nearest neighbors with ScaNN: a tree of clusters, asymmetric hashing, exact reordering in float32.

ScaNN trains clusters and hashes on a sample. Giving every key its cluster and its hash is the greater part of the work
where there are many keys; it is done here, on the device that JAX finds, and written as the files that ScaNN loads. The
keys pass through in blocks, so that a build needs no more memory than the index it leaves.

Hashes have one scale for all keys and dimensions, which a few keys of a far larger norm would take for themselves. So
keys are given centered on 0, and clusters and hashes are those of keys whose norms are capped; candidates are reordered
by the distances of the keys as they are.

Two builds from the same keys are the same, byte for byte. ScaNN does not promise that: it draws random seeds from the
operating system, so the clusters are seeded by k-means++; and its threads disagree about a few keys from run to run, so
one thread trains. Searches may use any number.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
import os
import pathlib
import tempfile
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.core.runtime import no_native_log
from mlpmem_jax.retrieval import neighbors

_BRUTE_FORCE_BELOW = 4096  # too few keys to cluster and hash well
# More than these of ScaNN's trainings made no difference to the recall.
_TREE_ITERATIONS, _HASHING_ITERATIONS, _HASHING_SAMPLE = 6, 5, 25_000
_CAP = 2.0  # largest norm that is clustered and hashed as it is, in medians of the sample's norms
_EFFORTS = (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # leaves searched, in multiples of those that are derived
_REORDERS = (1, 2, 4)  # candidates reordered, likewise
_REREAD_COST = 2  # of a number read for reordering, at random places, beside one of a hash or a center in sequence
_SMALLEST_LEAF = 4  # of the sample; ScaNN's 50 dissolves leaves when the sample has fewer than about 100 keys a leaf
_KEYS_PER_BLOCK = 8192
_ROWS_PER_CALL = 256
_RETRIED_NEIGHBORS = 1 << 22  # of one call: 32 MiB of ids and distances


@functools.cache
def unavailable() -> str:
    """Why ScaNN cannot be used, "" where it can; its wheels are for Linux on x86-64 alone."""
    if importlib.util.find_spec("scann") is None:
        return "is not installed (its wheels are for Linux on x86-64)"
    try:
        _scann()
    except Exception as error:  # a native library that does not fit raises what it likes
        return f"is installed but cannot be imported ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return ""


def is_available() -> bool:
    """Whether ScaNN is installed and can be imported."""
    return not unavailable()


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
            training_sample=min(max(training_sample, leaves), num_keys),
        )

    def efforts(self, num_keys: int, width: int, k: int, *, leaves: bool, reorder: bool) -> list[Options]:
        """Searches of the same index from this one on, with more leaves and more candidates, the cheapest first.

        Args:
          num_keys: N.
          width: D.
          k: neighbors wanted.
          leaves, reorder: whether the number of leaves and of candidates may grow.
        """
        choices = {
            dataclasses.replace(
                self,
                leaves_to_search=min(math.ceil(self.leaves_to_search * more_leaves), self.leaves),
                reorder=round(self.reorder * more_candidates, 2),
            )
            for more_leaves in (_EFFORTS if leaves else (1,))
            for more_candidates in (_REORDERS if reorder else (1,))
        }
        return sorted(choices, key=lambda options: (options.cost(num_keys, width, k), options.leaves_to_search))

    def cost(self, num_keys: int, width: int, k: int) -> int:
        """Bytes that one query reads: all centers, the hashes of the leaves searched, the keys that are reordered."""
        hashes = num_keys * self.leaves_to_search // self.leaves * width
        candidates = min(round(k * self.reorder), num_keys)
        return 4 * self.leaves * width + hashes + 4 * _REREAD_COST * candidates * width


def write(folder, size: int, width: int, read: Callable[[int, int], np.ndarray], options: Options) -> None:
    """Builds an index as files in an existing empty local folder, for `ScannIndex.load`.

    Args:
      size: N.
      width: D.
      read: function of (start, stop) that gives keys, float32 [stop - start, D], centered on 0.
    """
    folder = pathlib.Path(folder)
    if size < _BRUTE_FORCE_BELOW:
        _save(_scann().builder(np.ascontiguousarray(read(0, size)), 1, "squared_l2").score_brute_force(), folder)
        return
    with tempfile.TemporaryDirectory(dir=folder) as unfinished:
        keys_NxD = _create(pathlib.Path(unfinished) / "dataset.npy", (size, width), np.float32)
        for start in range(0, size, _KEYS_PER_BLOCK):
            keys_NxD[start : start + _KEYS_PER_BLOCK] = read(start, min(start + _KEYS_PER_BLOCK, size))
        # Drawn, because keys at even distances could all stand at the same place of their sequences.
        sample_S = np.sort(np.random.default_rng(0).choice(size, options.training_sample, replace=False))
        sample_SxD = keys_NxD[sample_S]
        cap = _CAP * float(np.median(np.linalg.norm(sample_SxD, axis=1)))
        _train(capped(sample_SxD, cap), options, folder)
        centers_LxD, leaves_L, codebook_Dx16 = _trained(folder)
        leaf_N = _create(pathlib.Path(unfinished) / "datapoint_to_token.npy", (size,), np.int32)
        codes_NxD = _create(pathlib.Path(unfinished) / "hashed_dataset.npy", (size, width), np.uint8)
        for start in range(0, size, _KEYS_PER_BLOCK):
            part = slice(start, min(start + _KEYS_PER_BLOCK, size))
            keys_BxD = np.zeros((_KEYS_PER_BLOCK, width), np.float32)  # one shape, one compilation
            keys_BxD[: part.stop - start] = capped(keys_NxD[part], cap)
            nearest_B, codes_BxD = _fill(keys_BxD, centers_LxD, codebook_Dx16)
            leaf_N[part] = leaves_L[np.asarray(nearest_B)[: part.stop - start]]
            codes_NxD[part] = np.asarray(codes_BxD)[: part.stop - start]
        for array in (keys_NxD, leaf_N, codes_NxD):
            array.flush()
            os.replace(array.filename, folder / pathlib.Path(array.filename).name)


def capped(keys_NxD: np.ndarray, cap: float) -> np.ndarray:
    """Keys of the same directions whose norms are at most `cap`, float32 [N, D]."""
    norms_Nx1 = np.linalg.norm(keys_NxD, axis=1, keepdims=True)
    return keys_NxD * np.minimum(1, cap / np.maximum(norms_Nx1, np.finfo(np.float32).tiny)).astype(np.float32)


def _create(file: pathlib.Path, shape: tuple[int, ...], dtype) -> np.memmap:
    return np.lib.format.open_memmap(file, mode="w+", dtype=dtype, shape=shape)


def _train(keys_SxD: np.ndarray, options: Options, folder: pathlib.Path) -> None:
    """Writes the index that ScaNN makes of a sample, float32 [S, D]."""
    builder = (
        _scann()
        .builder(keys_SxD, 1, "squared_l2")
        .tree(
            options.leaves,
            options.leaves_to_search,
            training_sample_size=len(keys_SxD),
            training_iterations=_TREE_ITERATIONS,
            min_partition_size=_SMALLEST_LEAF,
            random_init=False,
        )
    )
    # One dimension a block: more bytes to scan than two, far fewer candidates to reorder for the same recall.
    builder = builder.score_ah(
        1, training_sample_size=min(_HASHING_SAMPLE, len(keys_SxD)), training_iterations=_HASHING_ITERATIONS
    )
    _save(builder.reorder(1), folder)


def _save(builder, folder: pathlib.Path) -> None:
    builder.set_n_training_threads(1)
    with no_native_log():
        builder.build().serialize(str(folder), relative_path=True)


def _trained(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(centers of the clusters [L, D], their numbers int32 [L], centers of the hashes [D, 16]) that ScaNN wrote."""
    from scann.partitioning import partitioner_pb2
    from scann.proto import centers_pb2

    root = partitioner_pb2.SerializedPartitioner.FromString((folder / "serialized_partitioner.pb").read_bytes())
    root = root.kmeans.kmeans_tree.root
    codebook = centers_pb2.CentersForAllSubspaces.FromString((folder / "ah_codebook.pb").read_bytes())
    return (
        np.array([center.dimension for center in root.centers], np.float32),
        np.array([child.leaf_id for child in root.children], np.int32),
        np.array([[c.feature_value_float[0] for c in one.center] for one in codebook.subspace_centers], np.float32),
    )


@jax.jit
def _fill(keys_BxD, centers_LxD, codebook_DxC):
    """(nearest cluster of each key int32 [B], nearest center of each of its numbers uint8 [B, D])."""
    products_BxL = jnp.matmul(keys_BxD, centers_LxD.T, precision=jax.lax.Precision.HIGHEST)
    nearest_B = jnp.argmin(jnp.sum(centers_LxD**2, axis=1) - 2 * products_BxL, axis=1)
    order_DxC = jnp.argsort(codebook_DxC, axis=1)
    rising_DxC = jnp.take_along_axis(codebook_DxC, order_DxC, axis=1)
    codes_BxD = jnp.broadcast_to(order_DxC[:, 0], keys_BxD.shape)
    for center in range(1, codebook_DxC.shape[1]):
        is_past_BxD = keys_BxD > (rising_DxC[:, center - 1] + rising_DxC[:, center]) / 2
        codes_BxD = jnp.where(is_past_BxD, order_DxC[:, center], codes_BxD)
    return nearest_B, codes_BxD.astype(jnp.uint8)


class ScannIndex:
    """A ScaNN searcher over N keys. Make one with `build`, or with `write` and `load`."""

    def __init__(self, searcher, size: int, options: Options):
        self._searcher, self.size, self.options = searcher, size, options

    @classmethod
    def build(cls, keys_NxD: np.ndarray, options: Options) -> ScannIndex:
        """The index of keys that are in memory, float32 [N, D]."""
        with tempfile.TemporaryDirectory() as folder:
            write(folder, *keys_NxD.shape, lambda start, stop: keys_NxD[start:stop], options)
            return cls.load(folder, len(keys_NxD), options)

    def with_options(self, options: Options) -> ScannIndex:
        """The same index, searched in another way."""
        return ScannIndex(self._searcher, self.size, options)

    @classmethod
    def load(cls, folder, size: int, options: Options) -> ScannIndex:
        """Reads what `write` wrote."""
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
