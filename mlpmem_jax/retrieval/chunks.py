"""Work on many positions, in chunks on all cores."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import TypeVar

from threadpoolctl import threadpool_limits

from mlpmem_jax.core import host

# A chunk of work has few positions, so that a shard keeps every core of a large host busy, and few neighbors, so that
# what a thread sorts fits in its core's cache.
POSITIONS_PER_CHUNK = 256
NEIGHBORS_PER_CHUNK = 1 << 18

T = TypeVar("T")


def in_chunks(work: Callable[[slice], T], positions: int, k: int) -> list[T]:
    """Calls `work` on chunks of positions, with as many threads as cores; results are in order.

    NumPy and the searches release the GIL. A product within a chunk uses the chunk's thread alone: BLAS's own threads
    would wait in loops on cores that other chunks need.
    """
    rows = min(POSITIONS_PER_CHUNK, max(1, NEIGHBORS_PER_CHUNK // k))
    chunks = [slice(start, min(start + rows, positions)) for start in range(0, positions, rows)]
    with threadpool_limits(1, "blas"), concurrent.futures.ThreadPoolExecutor(host.cpu_count()) as threads:
        return list(threads.map(work, chunks))
