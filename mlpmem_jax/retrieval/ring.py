"""Nearest neighbors over a device mesh: keys stay on their devices, queries travel around a ring.

All mesh axes together form one ring. At each step a device compares its current queries with its own keys, using one
matrix product per block of keys, and merges the nearest into the k nearest so far, which travel with their queries;
after a full round the queries are back. Queries are smaller than keys: each has D numbers and k neighbors, and both
are sent to the next device while the current product is computed.

Distances are |q|^2 + |x|^2 - 2 q.x. Products of bfloat16 are exact and are added in float32; float16 and float32 are
multiplied in float32 (`Precision.HIGHEST`, several passes on a TPU). The error of a distance is then a few millionths
of |q|^2 + |x|^2, which matters only for near duplicates.

Ties are broken by the smaller id wherever neighbors are selected or merged, and blocks of keys are whole registers,
so that a product has the same bits at any place in a block: the result does not depend on the mesh (tested on CPUs).
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.retrieval import neighbors

QUERIES_PER_DEVICE = 512  # with fewer, a TPU is limited by reading keys from memory
SCORES_PER_BLOCK = 1 << 26  # per device, float32: 256 MiB
_NUMBERS_PER_BLOCK = 1 << 24  # of keys converted to float32 for their products: 64 MiB
_LANES = 128  # width of a TPU's registers; blocks of keys are multiples of it


def blocks(num_keys: int, width: int, dtype, devices: int, queries: int = QUERIES_PER_DEVICE) -> tuple[int, int]:
    """(blocks of keys per device, keys per block), for `queries` concurrent queries per device."""
    keys = -(-num_keys // devices)
    count = -(-keys * queries // SCORES_PER_BLOCK)
    if _is_converted(dtype):
        count = max(count, -(-keys * width // _NUMBERS_PER_BLOCK))
    return count, -(-keys // (count * _LANES)) * _LANES


def _is_converted(dtype) -> bool:
    """Whether products are computed from float32 copies."""
    return jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float32)


@functools.cache
def search_program(mesh: Mesh, num_keys: int, block: int, k: int, recall_target: float):
    """The jitted search over a mesh.

    Args:
      mesh: its devices, in order, are the ring.
      num_keys: number of keys, without padding.
      block: keys whose distances to a device's queries are in memory together; divides the keys of a device.
      k: neighbors per query.
      recall_target: 1 selects the k nearest of each block exactly. Lower values use `jax.lax.approx_max_k`, which takes
        the nearest of each of many bins and returns at least this share of the k nearest. CPUs always select exactly:
        there XLA implements approx_max_k by sorting whole rows, which is exact but takes 40 to 70 times as long
        (20,000 and 100,000 keys).

    Returns:
      A function of (keys [N, D], norms float32 [N], queries [Q, D], excluded int32 [Q, 2]), all sharded along axis 0
      over the whole mesh, N the number of keys including padding (with infinite norms). For query q, keys with ids in
      [start, stop) are excluded. It returns (squared distances float32 [Q, k], ids int32 [Q, k]), sharded likewise,
      nearest first, ties by smaller id; missing neighbors have infinite distances and id -1.
    """
    if mesh.devices.flat[0].platform == "cpu":
        recall_target = 1.0
    axes, devices = mesh.axis_names, mesh.size
    to_next = [(device, (device + 1) % devices) for device in range(devices)]

    def send(tree):
        return jax.lax.ppermute(tree, axes, to_next)

    def search_local(keys_NxD, norms_N, queries_QxD, excluded_Qx2):
        first = jax.lax.axis_index(axes) * len(keys_NxD)
        keys_UxCxD, norms_UxC = keys_NxD.reshape(-1, block, keys_NxD.shape[1]), norms_N.reshape(-1, block)
        select = functools.partial(_select, k=k, num_keys=num_keys, recall_target=recall_target)

        def step(_, carry):
            (queries_QxD, excluded_Qx2), best = carry
            arriving = send((queries_QxD, excluded_Qx2)), send(best)

            def compare(_, number):
                products_QxC = _products(queries_QxD, keys_UxCxD[number])
                ids_C = first + number * block + jnp.arange(block, dtype=jnp.int32)
                is_excluded_QxC = (ids_C >= excluded_Qx2[:, :1]) & (ids_C < excluded_Qx2[:, 1:])
                scores_QxC = jnp.where(is_excluded_QxC, jnp.inf, norms_UxC[number] - 2 * products_QxC)
                scores_QxJ, places_QxJ = select(scores_QxC)
                return None, (scores_QxJ, ids_C[0] + places_QxJ)

            _, nearest_UxQxJ = jax.lax.scan(compare, None, jnp.arange(len(keys_UxCxD)))
            nearest_QxJ = (jnp.moveaxis(array, 0, 1).reshape(len(queries_QxD), -1) for array in nearest_UxQxJ)
            best = _merge(arriving[1], tuple(nearest_QxJ), k)
            return arriving[0], best

        none = jnp.full((len(queries_QxD), k), jnp.inf), jnp.full((len(queries_QxD), k), neighbors.MISSING, jnp.int32)
        # Neighbors are sent one step after their queries, during the next product; an extra step completes their round.
        _, best = jax.lax.fori_loop(0, devices, step, ((queries_QxD, excluded_Qx2), none))
        scores_QxK, ids_QxK = send(best)
        distances_QxK = jnp.maximum(scores_QxK + squared_norms(queries_QxD)[:, None], 0)
        ids_QxK = jnp.where(jnp.isinf(distances_QxK), neighbors.MISSING, ids_QxK)
        # Adding |q|^2 may round different scores to the same distance, so ties are ordered again.
        return tuple(jax.lax.sort((distances_QxK, ids_QxK), dimension=1, num_keys=2))

    sharded = PartitionSpec(axes)
    return jax.jit(jax.shard_map(search_local, mesh=mesh, in_specs=sharded, out_specs=sharded, check_vma=False))


def program(
    mesh: Mesh, num_keys: int, queries: int, width: int, k: int, dtype: str = "bfloat16", recall_target: float = 1.0
):
    """The search and its abstract arguments, for ahead-of-time compilation: (jitted function, abstract arguments).

    Args:
      mesh: a mesh of any devices, present or not.
      num_keys: keys without padding; queries: Q, a multiple of the number of devices; width: D; k: neighbors.
      dtype: dtype of keys and queries.
      recall_target: as in `search_program`.
    """
    count, block = blocks(num_keys, width, dtype, mesh.size, queries // mesh.size)
    padded = count * block * mesh.size
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    arguments = (((padded, width), dtype), ((padded,), "float32"), ((queries, width), dtype), ((queries, 2), "int32"))
    return search_program(mesh, num_keys, block, k, recall_target), tuple(
        jax.ShapeDtypeStruct(shape, jnp.dtype(name), sharding=sharding) for shape, name in arguments
    )


def _products(left_NxD, right_CxD):
    precision = jax.lax.Precision.DEFAULT
    if left_NxD.dtype != jnp.bfloat16:
        left_NxD, right_CxD = left_NxD.astype(jnp.float32), right_CxD.astype(jnp.float32)
        precision = jax.lax.Precision.HIGHEST
    return jnp.matmul(left_NxD, right_CxD.T, precision=precision, preferred_element_type=jnp.float32)


def squared_norms(rows_NxD):
    """Computed by a matrix product, because the order of other reductions may depend on the number of rows."""
    squares_NxD = rows_NxD.astype(jnp.float32) ** 2
    return _products(squares_NxD, jnp.ones((_LANES, rows_NxD.shape[1])))[:, 0]


def _select(scores_QxC, *, k: int, num_keys: int, recall_target: float):
    """(scores, places) of at least the k smallest scores of each row (of most of them if approximate); of all scores
    if there are no more."""
    size = scores_QxC.shape[1]
    if recall_target < 1 and k <= size:
        return jax.lax.approx_min_k(
            scores_QxC,
            k,
            recall_target=recall_target,
            reduction_input_size_override=max(num_keys, size),  # a block may be padded beyond all keys
            aggregate_to_topk=False,
        )
    # The k smallest are in the k groups with the smallest minima. C / g + k g is minimal for this g. Groups are runs of
    # keys, and `top_k` takes the first of equal members, so ties go to the smaller ids.
    group = min(_LANES, 1 << max(0, round(math.log2(size / k) / 2)))
    groups = size // group  # blocks are multiples of 128 keys
    if group == 1:
        negated, places = jax.lax.top_k(-scores_QxC, min(k, size))
        return -negated, places
    smallest_QxU = scores_QxC.reshape(-1, groups, group).min(axis=2)
    _, chosen_QxK = jax.lax.top_k(-smallest_QxU, min(k, groups))
    places_QxJ = (group * jnp.sort(chosen_QxK)[:, :, None] + jnp.arange(group)).reshape(len(scores_QxC), -1)
    negated, among_QxK = jax.lax.top_k(-jnp.take_along_axis(scores_QxC, places_QxJ, axis=1), k)
    return -negated, jnp.take_along_axis(places_QxJ, among_QxK, axis=1)


def _merge(left, right, k: int):
    """The k nearest of two lists (scores [Q, ...], ids [Q, ...]), by score and then by id."""
    joined = (jnp.concatenate(arrays, axis=1) for arrays in zip(left, right, strict=True))
    return tuple(array[:, :k] for array in jax.lax.sort(tuple(joined), dimension=1, num_keys=2))
