"""Lists of nearest neighbors: packing, ordering and merging. A missing neighbor has distance inf and value MISSING."""

from __future__ import annotations

import numpy as np

MISSING = -1


def pack(distances_QxK: np.ndarray, values_QxK: np.ndarray) -> np.ndarray:
    """One uint64 per neighbor that orders by distance, then by value.

    Args:
      distances_QxK: float32, infinite where missing. Negative distances (rounding errors of 0) count as 0, because the
        bits of negative numbers would order after infinity.
      values_QxK: int32, ids or next tokens; ignored where missing.
    """
    distances_QxK = np.where(distances_QxK <= 0, np.float32(0), distances_QxK)
    packed_QxK = np.left_shift(distances_QxK.view(np.uint32), 32, dtype=np.uint64)
    packed_QxK |= np.ascontiguousarray(values_QxK).view(np.uint32)
    return packed_QxK


def unpack(packed_QxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pack`: (distances float32, values int32), with value MISSING where the distance is infinite."""
    distances_QxK = (packed_QxK >> np.uint64(32)).astype(np.uint32).view(np.float32)
    values_QxK = packed_QxK.astype(np.uint32).view(np.int32)
    values_QxK[np.isinf(distances_QxK)] = MISSING
    return distances_QxK, values_QxK


def smallest(packed_QxJ: np.ndarray, k: int) -> np.ndarray:
    """The k nearest of J >= k packed neighbors, nearest first: uint64 [Q, k]. Sorts `packed_QxJ` in place."""
    packed_QxJ.sort(axis=1)
    return packed_QxJ[:, :k]


def merge(left_QxK: np.ndarray | None, right_QxK: np.ndarray) -> np.ndarray:
    """The k nearest of two packed lists of k each; `left_QxK` is None if there is no list yet."""
    if left_QxK is None:
        return right_QxK
    return smallest(np.concatenate([left_QxK, right_QxK], axis=1), right_QxK.shape[1])
