"""Lists of nearest neighbours: packing, ordering and merging them. Where a neighbour is missing: id -1, distance inf."""

from __future__ import annotations

import numpy as np

MISSING = -1


def pack(distances_QxK: np.ndarray, values_QxK: np.ndarray) -> np.ndarray:
    """One uint64 per neighbour that orders by distance, then by value.

    Args:
      distances_QxK: float32, not negative, infinite where missing.
      values_QxK: int32, ids or next tokens; ignored where missing.
    """
    packed_QxK = np.left_shift(np.ascontiguousarray(distances_QxK).view(np.uint32), 32, dtype=np.uint64)
    packed_QxK |= np.ascontiguousarray(values_QxK).view(np.uint32)
    return packed_QxK


def unpack(packed_QxK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Inverse of `pack`: (distances float32, values int32), the value MISSING where the distance is infinite."""
    distances_QxK = (packed_QxK >> np.uint64(32)).astype(np.uint32).view(np.float32)
    values_QxK = packed_QxK.astype(np.uint32).view(np.int32)
    return distances_QxK, np.where(np.isinf(distances_QxK), np.int32(MISSING), values_QxK)


def smallest(distances_QxM: np.ndarray, values_QxM: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of M >= k neighbours, nearest first: (distances float32 [Q, k], values int32 [Q, k])."""
    packed_QxM = pack(distances_QxM, values_QxM)
    packed_QxM.sort(axis=1)
    return unpack(packed_QxM[:, :k])


def merge(
    left: tuple[np.ndarray, np.ndarray] | None, right: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of two lists of k neighbours each: (distances, values); `left` may be None, for no list yet."""
    if left is None:
        return right
    distances_Qx2K, values_Qx2K = (np.concatenate(parts, axis=1) for parts in zip(left, right, strict=True))
    return smallest(distances_Qx2K, values_Qx2K, right[0].shape[1])
