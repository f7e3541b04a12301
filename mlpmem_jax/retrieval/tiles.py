"""Tiles: one shard of keys searched for one shard of queries.

A tile leaves the k nearest neighbors so far; after the last shard of keys these become distributions. With one shard
of keys nothing is kept in between.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epath

from mlpmem_jax.core import host
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.progress import progress
from mlpmem_jax.retrieval import exact_backend, neighbors
from mlpmem_jax.retrieval.backends import Effort
from mlpmem_jax.retrieval.distribution import SparseDistributions, sparse_distributions
from mlpmem_jax.retrieval.key_shards import KeyShard, KeyShards
from mlpmem_jax.retrieval.queries import Queries, read_queries
from mlpmem_jax.retrieval.scratch import load_array, save_array
from mlpmem_jax.retrieval.targets_artifact import SMALLEST_PROBABILITY, TargetsWriter

NEIGHBORS_PER_THREAD = 1 << 18  # in one piece of work: what a thread sorts stays in its core's cache

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """How targets are made, resolved from the config.

    Attributes:
      k: neighbors.
      exclude: what a query of the training split may not retrieve, see `KeyShard.excluded`.
      keep: most entries of a distribution; 0 for all.
      minimum_probability: entries of this probability or less are dropped.
      temperature: of p_kNN, in squared-L2 units.
      effort: how hard to search; None where the backend knows only one way.
    """

    k: int
    exclude: str
    keep: int
    minimum_probability: float
    temperature: float
    effort: Effort | None = None

    def nearest(self, key_shard: KeyShard, queries: Queries, split: str) -> np.ndarray:
        """The nearest keys of one shard for positions of a split, packed with their next tokens, uint64 [Q, k]."""
        return key_shard.nearest(queries, self.k, self.exclude if split == "train" else None, self.effort)

    def distributions(self, packed_QxK: np.ndarray, queries: Queries) -> SparseDistributions:
        """What the nearest keys of all shards say about the next tokens."""
        minimum = max(self.minimum_probability, SMALLEST_PROBABILITY)
        distances_QxK, tokens_QxK = neighbors.unpack(packed_QxK)
        return sparse_distributions(
            distances_QxK, tokens_QxK, queries.next_tokens_Q, self.temperature, minimum, self.keep
        )


def in_pieces(work: Callable[[slice], T], positions: int, k: int) -> list[T]:
    """`work` of a few positions at a time, in order, by as many threads as there are cores.

    NumPy and the searches let other threads run.
    """
    rows = max(1, NEIGHBORS_PER_THREAD // k)
    pieces = [slice(start, min(start + rows, positions)) for start in range(0, positions, rows)]
    with concurrent.futures.ThreadPoolExecutor(host.cpu_count()) as threads:
        return list(threads.map(work, pieces))


class Split:
    """One split while its targets are made."""

    def __init__(self, name: str, datastore: Artifact, writer: TargetsWriter, scratch: epath.Path):
        self.name, self._datastore, self.writer = name, datastore, writer
        self._scratch = scratch / "neighbors" / name
        spec = datastore.arrays["next_tokens"]
        (self._sequences, self._length), self._per_shard = spec.shape, spec.rows_per_shard
        self.shards = [  # not a slice of the incomplete ones: processes may list them at different moments
            shard for shard in writer.incomplete_shards() if shard % jax.process_count() == jax.process_index()
        ]

    def positions(self, shard: int) -> int:
        """How many positions a shard has."""
        first, stop = self._bounds(shard)
        return (stop - first) * self._length

    def queries(self, shard: int) -> Queries:
        """The positions of a shard."""
        return read_queries(self._datastore, *self._bounds(shard))

    def _bounds(self, shard: int) -> tuple[int, int]:
        first = shard * self._per_shard
        return first, min(first + self._per_shard, self._sequences)

    def _tile(self, shard: int, key_shard: int) -> epath.Path:
        return self._scratch / f"{shard:06d}.{key_shard:04d}.npy"

    def searched(self) -> dict[int, int]:
        """How many key shards the kept tile of each query shard has been through."""
        counts: dict[int, int] = {}
        for file in self._scratch.glob("*.npy") if self._scratch.exists() else ():
            shard, key_shard = (int(part) for part in file.stem.split("."))
            counts[shard] = max(counts.get(shard, 0), key_shard + 1)
        return counts

    def read_tile(self, shard: int, key_shard: int) -> np.ndarray | None:
        """The nearest so far, after `key_shard`: packed, uint64 [Q, k]; None before the first key shard."""
        return None if key_shard < 0 else load_array(self._tile(shard, key_shard))

    def write_tile(self, shard: int, key_shard: int, packed_QxK: np.ndarray) -> None:
        """Keeps the nearest so far, after `key_shard`."""
        save_array(self._tile(shard, key_shard), packed_QxK)
        self.drop_tile(shard, key_shard - 1)

    def drop_tile(self, shard: int, key_shard: int) -> None:
        """Deletes what `write_tile` kept."""
        self._tile(shard, key_shard).unlink(missing_ok=True)


def make_tiles(splits: list[Split], key_shards: KeyShards, settings: TargetSettings) -> None:
    """All tiles of this process: the innermost work of the stage."""
    count, is_collective = len(key_shards), key_shards.search.backend.is_collective
    work = [
        (split, shard, searched.get(shard, 0))
        for split, searched in [(split, split.searched()) for split in splits]
        for shard in split.shards
    ]
    total = count * sum(split.positions(shard) for split, shard, _ in work)
    done = sum(split.positions(shard) * searched for split, shard, searched in work)
    with progress(total, "targets", "positions" if count == 1 else "positions x key shards", done) as bar:
        for number in range(count):
            remaining = [(split, shard) for split, shard, searched in work if searched <= number]
            # In a collective search no process may stay away while another still has queries.
            idle = exact_backend.largest(len(remaining)) - len(remaining) if is_collective else 0
            for split, shard in remaining:
                _make_tile(split, shard, key_shards, number, settings)
                bar.advance(split.positions(shard))
            for _ in range(idle):
                key_shards.open(number).index.search(np.empty((0, key_shards.width), np.float32), settings.k)


def _make_tile(split: Split, shard: int, key_shards: KeyShards, number: int, settings: TargetSettings) -> None:
    """Searches one key shard for one query shard, and writes its tile or, after the last key shard, its targets."""
    queries, key_shard = split.queries(shard), key_shards.open(number)
    so_far_QxK = split.read_tile(shard, number - 1)
    # A collective search runs in this thread, one batch after another, in step with those of other processes.
    of_all_QxK = settings.nearest(key_shard, queries, split.name) if key_shards.search.backend.is_collective else None

    def nearest(part: slice) -> np.ndarray:
        in_shard_QxK = (
            settings.nearest(key_shard, queries[part], split.name) if of_all_QxK is None else of_all_QxK[part]
        )
        return neighbors.merge(None if so_far_QxK is None else so_far_QxK[part], in_shard_QxK)

    def distributions(part: slice) -> tuple[SparseDistributions, int]:
        packed_QxK = nearest(part)
        lacking = int(np.isinf(neighbors.unpack(packed_QxK)[0][:, -1]).sum())
        return settings.distributions(packed_QxK, queries[part]), lacking

    if number < len(key_shards) - 1:
        split.write_tile(shard, number, np.concatenate(in_pieces(nearest, len(queries), settings.k)))
        return
    parts, lacking = zip(*in_pieces(distributions, len(queries), settings.k), strict=True)
    split.writer.write_shard(shard, parts, sum(lacking))
    split.drop_tile(shard, number - 1)
