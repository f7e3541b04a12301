"""Nearest neighbors over a device mesh: every device keeps its keys, queries travel from device to device.

All mesh axes together are one ring. At each of its steps a device compares the queries that are with it to its own
keys, a matrix product per block of keys, and merges what it finds into the k nearest that travel along; after a whole
round the queries are home. Queries are lighter to send than keys: D numbers and k neighbors each, and both go on to
the next device while the present product is computed.

Distances are |q|^2 + |x|^2 - 2 q.x. Products of bfloat16 are exact and are added in float32; float16 and float32 are
multiplied in float32 (`Precision.HIGHEST`, several passes on a TPU). A distance is then wrong by a few millionths of
|q|^2 + |x|^2, which matters to near duplicates alone.

Equal distances are settled by id wherever neighbors are selected or merged, and blocks of keys are whole registers, in
which a product has the same bits wherever it stands: what is found does not depend on the mesh (tested on CPUs).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.core.sharding import local_rows
from mlpmem_jax.retrieval import neighbors

QUERIES_PER_DEVICE = 512  # fewer, and a TPU waits for keys from its memory
_SCORES_AT_ONCE = 1 << 26  # of one device, float32: 256 MiB
_LANES = 128  # width of a TPU's registers; blocks of keys are whole multiples


def blocks(num_keys: int, devices: int, queries: int = QUERIES_PER_DEVICE) -> tuple[int, int]:
    """(blocks of keys on each device, keys of a block), for `queries` at once on each device."""
    keys = -(-num_keys // devices)
    count = -(-keys * queries // _SCORES_AT_ONCE)
    return count, -(-keys // (count * _LANES)) * _LANES


@functools.cache
def search_program(mesh: Mesh, num_keys: int, block: int, k: int, recall_target: float = 1.0):
    """The jitted search over a mesh.

    Args:
      mesh: its devices, in order, are the ring.
      num_keys: N, without padding.
      block: keys whose distances to the queries of a device exist at once; it divides the keys of a device.
      k: neighbors wanted.
      recall_target: 1 selects the k nearest of each block exactly. Less leaves the selection to
        `jax.lax.approx_max_k`: the nearest of each of many bins, so few of the k nearest are lost that this share of
        them is found. On CPUs and GPUs it is exact as well.

    Returns:
      A function of (keys [P, D], norms float32 [P], queries [Q, D], excluded int32 [Q, 2]), all sharded along axis 0
      over the whole mesh, P the number of keys with padding (its norm is infinite). Of query q, keys with ids in
      [start, stop) are left out. It returns (squared distances float32 [Q, k], ids int32 [Q, k]), sharded likewise,
      nearest first, at equal distance the smaller id first; where there are fewer than k keys, infinite distances and
      ids of -1.
    """
    axes, devices = mesh.axis_names, mesh.size
    onwards = [(device, (device + 1) % devices) for device in range(devices)]

    def travel(tree):
        return jax.lax.ppermute(tree, axes, onwards)

    def at_home(keys_nxD, norms_n, queries_qxD, excluded_qx2):
        first = jax.lax.axis_index(axes) * len(keys_nxD)
        keys_bxBxD, norms_bxB = keys_nxD.reshape(-1, block, keys_nxD.shape[1]), norms_n.reshape(-1, block)
        select = functools.partial(_select, k=k, num_keys=num_keys, recall_target=recall_target)

        def step(_, visitors):
            (queries_qxD, excluded_qx2), best = visitors
            arriving = travel((queries_qxD, excluded_qx2)), travel(best)

            def compare(_, number):
                products_qxB = _products(queries_qxD, keys_bxBxD[number])
                ids_B = first + number * block + jnp.arange(block, dtype=jnp.int32)
                is_excluded_qxB = (ids_B >= excluded_qx2[:, :1]) & (ids_B < excluded_qx2[:, 1:])
                scores_qxB = jnp.where(is_excluded_qxB, jnp.inf, norms_bxB[number] - 2 * products_qxB)
                scores_qxC, places_qxC = select(scores_qxB)
                return None, (scores_qxC, ids_B[0] + places_qxC)

            _, found_bxqxC = jax.lax.scan(compare, None, jnp.arange(len(keys_bxBxD)))
            found_qxC = (jnp.moveaxis(array, 0, 1).reshape(len(queries_qxD), -1) for array in found_bxqxC)
            best = _merge(arriving[1], tuple(found_qxC), k)
            return arriving[0], best

        none = jnp.full((len(queries_qxD), k), jnp.inf), jnp.full((len(queries_qxD), k), neighbors.MISSING, jnp.int32)
        # The neighbors travel one step behind their queries, beside the next product; one step more brings them home.
        _, best = jax.lax.fori_loop(0, devices, step, ((queries_qxD, excluded_qx2), none))
        scores_qxk, ids_qxk = travel(best)
        distances_qxk = jnp.maximum(scores_qxk + _squared_norms(queries_qxD)[:, None], 0)
        ids_qxk = jnp.where(jnp.isinf(distances_qxk), neighbors.MISSING, ids_qxk)
        # Sums round different scores to one distance.
        return tuple(jax.lax.sort((distances_qxk, ids_qxk), dimension=1, num_keys=2))

    sharded = PartitionSpec(axes)
    return jax.jit(jax.shard_map(at_home, mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False))


def program(
    mesh: Mesh, num_keys: int, queries: int, width: int, k: int, dtype: str = "bfloat16", recall_target: float = 1.0
):
    """The search and the shapes of its arguments, to compile ahead of time: (jitted function, abstract arguments).

    Args:
      mesh: of any devices, present or not.
      num_keys: N; queries: Q, a multiple of the number of devices; width: D; k: neighbors.
      dtype: of keys and queries.
      recall_target: as of `search_program`.
    """
    count, block = blocks(num_keys, mesh.size, queries // mesh.size)
    padded = count * block * mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    arguments = (((padded, width), dtype), ((padded,), "float32"), ((queries, width), dtype), ((queries, 2), "int32"))
    return search_program(mesh, num_keys, block, k, recall_target), tuple(
        jax.ShapeDtypeStruct(shape, jnp.dtype(name), sharding=sharding) for shape, name in arguments
    )


def _products(left_qxD, right_BxD):
    precision = jax.lax.Precision.DEFAULT
    if left_qxD.dtype != jnp.bfloat16:
        left_qxD, right_BxD = left_qxD.astype(jnp.float32), right_BxD.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST
    return jnp.matmul(left_qxD, right_BxD.T, precision=precision, preferred_element_type=jnp.float32)


def _squared_norms(rows_NxD):
    """Added up by a matrix product: the order in which a compiler adds otherwise depends on the number of rows."""
    squares_NxD = rows_NxD.astype(jnp.float32) ** 2
    return _products(squares_NxD, jnp.ones((_LANES, rows_NxD.shape[1])))[:, 0]


def _select(scores_QxB, *, k: int, num_keys: int, recall_target: float):
    """(scores, places) of at least the k smallest scores of each row, or of most of them; of all where there are no
    more."""
    size = scores_QxB.shape[1]
    if recall_target < 1 and k <= size:
        return jax.lax.approx_min_k(
            scores_QxB, k, recall_target=recall_target, reduction_input_size_override=num_keys, aggregate_to_topk=False
        )
    # The k smallest lie in the k groups whose smallest member is smallest. B / g + k g is least at this g. Groups are
    # runs of keys, and of equal members `top_k` takes the first: so equal scores go to the smaller ids.
    group = min(_LANES, 1 << max(0, round(math.log2(size / k) / 2)))
    groups = size // group  # blocks are whole multiples of 128 keys
    if group == 1:
        negated, places = jax.lax.top_k(-scores_QxB, min(k, size))
        return -negated, places
    smallest_QxG = scores_QxB.reshape(-1, groups, group).min(axis=2)
    _, chosen_Qxk = jax.lax.top_k(-smallest_QxG, min(k, groups))
    places_QxC = (group * jnp.sort(chosen_Qxk)[:, :, None] + jnp.arange(group)).reshape(len(scores_QxB), -1)
    negated, among_Qxk = jax.lax.top_k(-jnp.take_along_axis(scores_QxB, places_QxC, axis=1), k)
    return -negated, jnp.take_along_axis(places_QxC, among_Qxk, axis=1)


def _merge(left, right, k: int):
    """The k nearest of two lists (scores [Q, ...], ids [Q, ...]), by score and then by id."""
    both = (jnp.concatenate(arrays, axis=1) for arrays in zip(left, right, strict=True))
    return tuple(array[:, :k] for array in jax.lax.sort(tuple(both), dimension=1, num_keys=2))


class MeshIndex:
    """Keys on the devices of a mesh. Same interface as `ExactIndex`, but that all processes call it together."""

    def __init__(self, size: int, width: int, dtype, read: Callable, mesh: Mesh, recall_target: float = 1.0):
        """Each process reads the keys of its own devices and no others.

        Args:
          size: N, below 2^31.
          width: D.
          dtype: of the keys on the devices.
          read: function of (start, stop) that gives keys [stop - start, D].
          mesh: the devices.
          recall_target: as of `search_program`.
        """
        self.size, self._mesh, self._recall_target = size, mesh, recall_target
        self._dtype = jnp.dtype(dtype)
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        count, self._block = blocks(size, mesh.size)
        padded = count * self._block * mesh.size

        def resident(place: tuple[slice, ...]) -> np.ndarray:
            start, stop = place[0].start or 0, place[0].stop or padded
            keys_nxD = np.zeros((stop - start, width), self._dtype)
            if start < size:
                keys_nxD[: min(stop, size) - start] = read(start, min(stop, size))
            return keys_nxD

        self._keys = jax.make_array_from_callback((padded, width), self._sharding, resident)

        def local_norms(keys_nxD):
            return jax.lax.map(_squared_norms, keys_nxD.reshape(-1, self._block, width)).ravel()

        def norms(keys_PxD):
            axes = self._sharding.spec
            norms_P = jax.shard_map(local_norms, mesh=mesh, in_specs=axes, out_specs=axes, check_vma=False)(keys_PxD)
            return jnp.where(jnp.arange(padded) < size, norms_P, jnp.inf)

        self._norms = jax.jit(norms, out_shardings=self._sharding)(self._keys)

    def search(
        self, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query. All processes of the mesh call it together, each with its own queries, as
        many as it has, none included.

        Args:
          queries_QxD: float [Q, D], of the process; rounded to the type of the keys.
          k: neighbors wanted.
          excluded_Qx2: int [Q, 2]; of query q, keys with ids in [start, stop) are left out. None leaves none out.

        Returns:
          (squared distances float32 [Q, k], ids int32 [Q, k]), nearest first, at equal distance the smaller id first;
          where there are fewer than k keys, infinite distances and ids of -1.
        """
        if excluded_Qx2 is None:
            excluded_Qx2 = np.zeros((len(queries_QxD), 2), np.int32)
        local = self._mesh.local_mesh.size
        count = most(len(queries_QxD))
        rows = local * min(QUERIES_PER_DEVICE, 1 << max(3, math.ceil(math.log2(max(1, count / local)))))
        search = search_program(self._mesh, self.size, self._block, k, self._recall_target)
        found = [np.empty((0, k), np.float32)], [np.empty((0, k), np.int32)]
        for start in range(0, count, rows):
            batch = (
                _padded(np.asarray(queries_QxD[start : start + rows], self._dtype), rows),
                _padded(np.asarray(excluded_Qx2[start : start + rows], np.int32), rows),
            )
            queries, excluded = (jax.make_array_from_process_local_data(self._sharding, array) for array in batch)
            for parts, array in zip(found, search(self._keys, self._norms, queries, excluded), strict=True):
                parts.append(local_rows(array))
        distances_QxK, ids_QxK = (np.concatenate(parts)[: len(queries_QxD)] for parts in found)
        return distances_QxK, ids_QxK


def most(count: int) -> int:
    """The largest of the counts that the processes call this with, together."""
    return count if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.asarray(count)).max())


def _padded(rows_RxC: np.ndarray, rows: int) -> np.ndarray:
    return np.pad(rows_RxC, ((0, rows - len(rows_RxC)), (0, 0)))
