"""Exact nearest neighbours in JAX: one matrix product per block of keys, then the smallest distances of each row.

It runs on any one device, and is the truth that ScaNN is measured against.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.retrieval import neighbors

_KEYS_PER_BLOCK = 1 << 20
_SCORES_PER_BLOCK = 1 << 26  # float32 distances that exist at once: 256 MiB


class ExactIndex:
    """All squared L2 distances, no approximation. Same interface as `scann_index.ScannIndex`."""

    def __init__(self, keys_NxD: np.ndarray):
        """keys_NxD: float32 [N, D]."""
        self._host_keys_NxD = np.asarray(keys_NxD, np.float32)
        self._blocks: dict[int, list[tuple[jax.Array, jax.Array]]] = {}  # by group size

    @property
    def size(self) -> int:
        return len(self._host_keys_NxD)

    def search(
        self, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query.

        Args:
          queries_QxD: float32 [Q, D].
          k: neighbours wanted.
          excluded_Qx2: int [Q, 2]; of query q, keys with ids in [start, stop) are left out. None leaves none out.

        Returns:
          (squared distances float32 [Q, k], ids int32 [Q, k]), nearest first, at equal distance the smaller id first;
          where there are fewer than k keys, infinite distances and ids of -1.
        """
        if excluded_Qx2 is None:
            excluded_Qx2 = np.zeros((len(queries_QxD), 2), np.int32)
        # The k nearest lie in the k groups whose nearest member is nearest. N / g + k g is least at this g.
        group = max(1, round(math.sqrt(self.size / k)))
        group = 1 << (group.bit_length() - 1)
        rows = max(8, min(1024, _SCORES_PER_BLOCK // min(self.size, _KEYS_PER_BLOCK)))
        found = []
        for start in range(0, len(queries_QxD), rows):
            queries = np.zeros((rows, queries_QxD.shape[1]), np.float32)  # one shape, one compilation
            excluded = np.zeros((rows, 2), np.int32)
            part = slice(start, min(start + rows, len(queries_QxD)))
            queries[: part.stop - start], excluded[: part.stop - start] = (
                queries_QxD[part],
                excluded_Qx2[part],
            )
            best, first = None, 0
            for keys, norms in self._device_blocks(group):
                block = _search_block(queries, keys, norms, excluded - first, k=k, group=group)
                distances, ids = (np.asarray(array) for array in block)
                best = neighbors.merge(best, neighbors.pack(distances, ids + np.int32(first)))
                first += _KEYS_PER_BLOCK
            found.append(best[: part.stop - start])
        return neighbors.unpack(neighbors.smallest(np.concatenate(found), k))

    def _device_blocks(self, group: int) -> list[tuple[jax.Array, jax.Array]]:
        """Blocks of keys and their squared norms, padded to whole groups; padding has an infinite norm."""
        if group not in self._blocks:
            self._blocks.clear()
            blocks = []
            for start in range(0, self.size, _KEYS_PER_BLOCK):
                keys = self._host_keys_NxD[start : start + _KEYS_PER_BLOCK]
                padding = -len(keys) % group
                keys = jnp.pad(jnp.asarray(keys), ((0, padding), (0, 0)))
                norms = jnp.sum(keys * keys, axis=1).at[keys.shape[0] - padding :].set(jnp.inf)
                blocks.append((keys, norms))
            self._blocks[group] = blocks
        return self._blocks[group]


@functools.partial(jax.jit, static_argnames=("k", "group"))
def _search_block(queries_QxD, keys_BxD, norms_B, excluded_Qx2, *, k: int, group: int):
    """(squared distances [Q, k], ids within the block [Q, k]) of the k nearest keys, in no special order."""
    # Groups are runs of keys, and of equal members `top_k` takes the first: so equal scores go to the smaller ids.
    groups = keys_BxD.shape[0] // group
    products_QxB = jnp.matmul(queries_QxD, keys_BxD.T, precision=jax.lax.Precision.HIGHEST)
    products_QxGxg, norms_Gxg = products_QxB.reshape(-1, groups, group), norms_B.reshape(groups, group)

    def scores(products, norms, ids):
        """Distances but for the query's own norm, which does not change the order; infinite where excluded."""
        is_excluded = (ids >= excluded_Qx2[:, :1]) & (ids < excluded_Qx2[:, 1:])
        return jnp.where(is_excluded, jnp.inf, norms - 2 * products)

    def nearer(member, nearest_QxG):
        ids_G = group * jnp.arange(groups) + member
        member_scores = scores(products_QxGxg[:, :, member], norms_Gxg[:, member], ids_G)
        return jnp.minimum(nearest_QxG, member_scores)

    # A loop of minima, because XLA on CPUs makes slow scalar code of a reduction that is fused with its operands.
    nearest_QxG = jax.lax.fori_loop(0, group, nearer, jnp.full((len(queries_QxD), groups), jnp.inf))
    _, chosen_QxK = jax.lax.top_k(-nearest_QxG, min(k, groups))
    ids_QxC = (group * jnp.sort(chosen_QxK)[:, :, None] + jnp.arange(group)).reshape(len(queries_QxD), -1)
    scores_QxC = scores(jnp.take_along_axis(products_QxB, ids_QxC, axis=1), norms_B[ids_QxC], ids_QxC)
    negated_QxK, places_QxK = jax.lax.top_k(-scores_QxC, min(k, ids_QxC.shape[1]))
    ids_QxK = jnp.take_along_axis(ids_QxC, places_QxK, axis=1)

    # Differences, not norms and products, so that near duplicates come out near zero.
    distances_QxK = jnp.sum((keys_BxD[ids_QxK] - queries_QxD[:, None]) ** 2, axis=2)
    distances_QxK = jnp.where(jnp.isinf(negated_QxK), jnp.inf, distances_QxK)
    missing = ((0, 0), (0, k - distances_QxK.shape[1]))
    return (
        jnp.pad(distances_QxK, missing, constant_values=jnp.inf),
        jnp.pad(ids_QxK.astype(jnp.int32), missing, constant_values=neighbors.MISSING),
    )
