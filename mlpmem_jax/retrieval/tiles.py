"""Tiles: each searches one shard of keys for one shard of queries.

A tile stores the k nearest neighbors so far; after the last shard of keys these become distributions. With a single
shard of keys nothing is stored in between.
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.progress import progress
from mlpmem_jax.retrieval import exact_backend, neighbors
from mlpmem_jax.retrieval.backends import Effort
from mlpmem_jax.retrieval.chunks import in_chunks
from mlpmem_jax.retrieval.distribution import SparseDistributions, sparse_distributions
from mlpmem_jax.retrieval.key_shards import KeyShard, KeyShards
from mlpmem_jax.retrieval.queries import Queries, read_queries
from mlpmem_jax.retrieval.scratch import load_array, save_array
from mlpmem_jax.retrieval.targets_artifact import SMALLEST_PROBABILITY, TargetsWriter

NEIGHBOR_BYTES = 8  # of a neighbor that is stored between two shards of keys, packed


@dataclasses.dataclass(frozen=True)
class TargetSettings:
    """How targets are built, resolved from the config.

    Attributes:
      k: neighbors per position.
      exclude: what a query of the training split must not retrieve, see `KeyShard.excluded`.
      keep: maximum entries per distribution; 0 for all.
      minimum_probability: entries with at most this probability are dropped.
      temperature: temperature of p_kNN, in squared-L2 units.
      effort: the search effort; None if the backend has only one.
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
        """Next-token distributions from the nearest keys of all shards."""
        minimum = max(self.minimum_probability, SMALLEST_PROBABILITY)
        distances_QxK, tokens_QxK = neighbors.unpack(packed_QxK)
        return sparse_distributions(
            distances_QxK, tokens_QxK, queries.next_tokens_Q, self.temperature, minimum, self.keep
        )


class Split:
    """One split while its targets are being built."""

    def __init__(self, name: str, datastore: Artifact, writer: TargetsWriter, scratch: epath.Path):
        self.name, self._datastore, self.writer = name, datastore, writer
        self._scratch = scratch / "neighbors" / name
        spec = datastore.arrays["next_tokens"]
        (self._sequences, self._length), self._per_shard = spec.shape, spec.rows_per_shard
        self.shards = [  # not from the incomplete ones: processes may list those at different times
            shard for shard in writer.incomplete_shards() if shard % jax.process_count() == jax.process_index()
        ]

    def positions(self, shard: int) -> int:
        """The number of positions in a shard."""
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
        """For each query shard with a stored tile, the number of key shards searched so far."""
        counts: dict[int, int] = {}
        for file in self._scratch.iterdir() if self._scratch.exists() else ():
            if file.suffix != ".npy":
                continue
            shard, key_shard = (int(part) for part in file.stem.split("."))
            counts[shard] = max(counts.get(shard, 0), key_shard + 1)
        return counts

    def read_tile(self, shard: int, key_shard: int) -> np.ndarray | None:
        """The nearest neighbors after `key_shard`: packed, uint64 [Q, k]; None before the first key shard."""
        return None if key_shard < 0 else load_array(self._tile(shard, key_shard))

    def write_tile(self, shard: int, key_shard: int, packed_QxK: np.ndarray) -> None:
        """Stores the nearest neighbors after `key_shard`."""
        save_array(self._tile(shard, key_shard), packed_QxK)
        self.drop_tile(shard, key_shard - 1)

    def drop_tile(self, shard: int, key_shard: int) -> None:
        """Deletes what `write_tile` stored."""
        self._tile(shard, key_shard).unlink(missing_ok=True)


def make_tiles(splits: list[Split], key_shards: KeyShards, settings: TargetSettings) -> None:
    """Computes all tiles of this process, the main work of the stage."""
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
            # In a collective search every process must take part as long as any process has queries.
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
    # A collective search runs in this thread, one batch at a time, in lockstep with other processes.
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
        split.write_tile(shard, number, np.concatenate(in_chunks(nearest, len(queries), settings.k)))
        return
    parts, lacking = zip(*in_chunks(distributions, len(queries), settings.k), strict=True)
    split.writer.write_shard(shard, parts, sum(lacking))
    split.drop_tile(shard, number - 1)
