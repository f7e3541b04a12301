"""Exact nearest neighbors in JAX: every query against every key, on one device or around a ring of them (`ring`)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.core.sharding import local_rows
from mlpmem_jax.retrieval import neighbors, ring
from mlpmem_jax.retrieval.backends import KeySource, Needs

_READ_BYTES = 1 << 26  # bytes of keys per transfer to a device
_BLOCK_BYTES = 1 << 26  # bytes of keys per block, where a device searches keys in blocks


@dataclasses.dataclass(frozen=True)
class Backend:
    """Exact search on the devices of a mesh, where each process holds a part of the keys.

    Attributes:
      k: neighbors per query of an index.
      mesh: the devices; None for planning without devices.
      recall_target: recall of the selection, see `ring.search_program`.
    """

    k: int
    mesh: Mesh | None
    recall_target: float = 1.0

    is_rotated = False
    remedies = "a larger config.targets.recall_target or search_dimensions"

    @property
    def is_collective(self) -> bool:
        return self.mesh is not None and self.mesh.size > 1

    @property
    def is_exact(self) -> bool:
        return self.recall_target == 1

    @classmethod
    def unavailable(cls) -> str:
        return ""

    @classmethod
    def create(cls, settings: Mapping, k: int, mesh: Mesh | None = None) -> Backend:
        return cls(k, mesh, settings.get("recall_target", 1.0))

    def needs(self, rows: int, width: int, key_bytes: int, processes: int) -> Needs:
        # Host and device both hold the keys during placement, and share memory if the device is a CPU.
        rows = -(-rows // processes)
        return Needs(2 * rows * width * key_bytes + search_bytes(rows, width, key_bytes))

    def flops(self, rows: int, width: int, queries: int) -> float:
        return 2.0 * width * rows * queries

    def efforts(self, rows: int, width: int) -> tuple[list, int]:
        return [], 0

    def open(self, keys: KeySource, folder: epath.Path) -> ExactIndex:
        return ExactIndex(keys, self.mesh, self.recall_target)  # no index is built, so none is stored


class ExactIndex:
    """Keys on the devices of a mesh. All processes of the mesh make it, and search it, together."""

    def __init__(self, keys: KeySource, mesh: Mesh, recall_target: float = 1.0):
        """Each process reads only the keys of its own devices.

        Args:
          keys: fewer than 2^31; the devices keep them in their dtype.
          mesh: the devices.
          recall_target: as of `ring.search_program`.
        """
        self.size, self._mesh, self._recall_target = keys.size, mesh, recall_target
        self._dtype = jnp.dtype(keys.dtype)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        count, self._block = ring.blocks(keys.size, keys.width, self._dtype, mesh.size)
        padded = count * self._block * mesh.size
        rows = max(1, _READ_BYTES // (keys.width * self._dtype.itemsize))

        def resident(place: tuple[slice, ...]) -> np.ndarray:
            first, last = place[0].start or 0, place[0].stop or padded
            keys_NxD = np.zeros((last - first, keys.width), self._dtype)
            for start in range(first, min(last, keys.size), rows):
                stop = min(start + rows, last, keys.size)
                keys_NxD[start - first : stop - first] = keys.read(start, stop)
            return keys_NxD

        self._keys = jax.make_array_from_callback((padded, keys.width), self._sharding, resident)

        def local_norms(keys_NxD):
            return jax.lax.map(ring.squared_norms, keys_NxD.reshape(-1, self._block, keys.width)).ravel()

        def norms(keys_NxD):
            axes = self._sharding.spec
            norms_N = jax.shard_map(local_norms, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)(keys_NxD)
            return jnp.where(jnp.arange(padded) < keys.size, norms_N, jnp.inf)

        self._norms = jax.jit(norms, out_shardings=self._sharding)(self._keys)

    def search(
        self, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray | None = None, effort: None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query, at equal distance the smaller id first; see `backends.Index.search`.

        Processes may have any number of queries each, none included. Queries are rounded to the dtype of the keys.
        """
        if excluded_Qx2 is None:
            excluded_Qx2 = np.zeros((len(queries_QxD), 2), np.int32)
        local = self._mesh.local_mesh.size
        count = largest(len(queries_QxD)) if self._mesh.is_multi_process else len(queries_QxD)
        rows = local * min(ring.QUERIES_PER_DEVICE, 1 << max(3, math.ceil(math.log2(max(1, count / local)))))
        search = ring.search_program(self._mesh, self.size, self._block, k, self._recall_target)
        batches = [np.empty((0, k), np.float32)], [np.empty((0, k), np.int32)]
        for start in range(0, count, rows):
            batch = (
                _padded(np.asarray(queries_QxD[start : start + rows], self._dtype), rows),
                _padded(np.asarray(excluded_Qx2[start : start + rows], np.int32), rows),
            )
            queries, excluded = (jax.make_array_from_process_local_data(self._sharding, array) for array in batch)
            for parts, array in zip(batches, search(self._keys, self._norms, queries, excluded), strict=True):
                parts.append(local_rows(array))
        distances_QxK, ids_QxK = (np.concatenate(parts)[: len(queries_QxD)] for parts in batches)
        return distances_QxK, ids_QxK


def search_in_blocks(
    keys: KeySource, mesh: Mesh | None, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """An exact search that never holds all keys, at `_BLOCK_BYTES` of them on a device; as `backends.Index.search`.

    Args:
      keys: the shard's keys.
      mesh: devices that search together; None for only the first device of this process.
    """
    if mesh is None:
        mesh = Mesh(np.array(jax.local_devices()[:1]), ("device",))
    rows = max(1, mesh.size * _BLOCK_BYTES // (keys.width * np.dtype(keys.dtype).itemsize))
    nearest_QxK = None
    for first in range(0, keys.size, rows):

        def read(start: int, stop: int, first: int = first) -> np.ndarray:
            return keys.read(first + start, first + stop)

        block = dataclasses.replace(keys, size=min(rows, keys.size - first), read=read)
        distances_QxK, ids_QxK = ExactIndex(block, mesh).search(queries_QxD, k, excluded_Qx2 - first)
        ids_QxK = np.where(ids_QxK == neighbors.MISSING, ids_QxK, ids_QxK + np.int32(first))
        nearest_QxK = neighbors.merge(nearest_QxK, neighbors.pack(distances_QxK, ids_QxK))
    return neighbors.unpack(nearest_QxK)


def search_bytes(rows: int, width: int, key_bytes: int) -> int:
    """Memory of a search in addition to the index's keys: float32 distances, half as much again for their selection,
    and blocks of keys."""
    rows = min(rows, _BLOCK_BYTES // (width * key_bytes) + 1)
    return 6 * min(ring.SCORES_PER_BLOCK, ring.QUERIES_PER_DEVICE * rows) + 2 * _BLOCK_BYTES


def largest(count: int) -> int:
    """The maximum of `count` over all processes; a collective call."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.asarray(count)).max())


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(array, ((0, rows - len(array)), (0, 0)))
