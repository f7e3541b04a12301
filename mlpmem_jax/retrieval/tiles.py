"""Tiles: one shard of keys by one shard of queries.

A tile leaves the k nearest neighbors found so far; the last shard of keys turns them into distributions. With one shard
of keys nothing is kept in between.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import io
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath

from mlpmem_jax.core import runtime
from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.progress import progress
from mlpmem_jax.retrieval import neighbors, ring
from mlpmem_jax.retrieval.distribution import SparseDistributions, sparse_distributions
from mlpmem_jax.retrieval.key_shards import KeyShard, KeyShards, Queries, read_queries, writing
from mlpmem_jax.retrieval.targets_artifact import SMALLEST_PROBABILITY, TargetsWriter

_NEIGHBORS_AT_ONCE = 1 << 18  # of one thread: what it sorts stays in its core's cache


@dataclasses.dataclass(frozen=True)
class Plan:
    """What the stage needs to know, resolved from the config."""

    backend: str
    k: int
    exclude: str
    keep: int
    minimum_probability: float

    @property
    def entries(self) -> int:
        """The most entries that a distribution can have."""
        return min(self.k, self.keep) if self.keep else self.k


def find_neighbors(shard: KeyShard, queries: Queries, plan: Plan, split: str) -> np.ndarray:
    """The nearest keys of one shard, packed (distance, next token) as `neighbors.pack` does, uint64 [Q, k]."""
    excluded_Qx2 = shard.excluded(queries, plan.exclude) if split == "train" else None
    distances_QxK, ids_QxK = shard.index.search(queries.keys_QxD, plan.k, excluded_Qx2)
    return neighbors.pack(distances_QxK, shard.next_tokens_N[ids_QxK])


def _distributions(packed_QxK: np.ndarray, queries: Queries, plan: Plan, temperature: float) -> SparseDistributions:
    minimum = max(plan.minimum_probability, SMALLEST_PROBABILITY)
    distances_QxK, tokens_QxK = neighbors.unpack(packed_QxK)
    return sparse_distributions(distances_QxK, tokens_QxK, queries.next_tokens_Q, temperature, minimum, plan.keep)


class Split:
    """The targets of one split while they are being made."""

    def __init__(self, name: str, datastore: Artifact, writer: TargetsWriter, scratch: epath.Path):
        self.name, self._datastore, self.writer = name, datastore, writer
        self._scratch = scratch / "neighbors" / name
        spec = datastore.arrays["next_tokens"]
        (self._sequences, self.length), self._per_shard = spec.shape, spec.rows_per_shard
        self.shards = [  # not a slice of the incomplete ones: processes may list them at different moments
            shard for shard in writer.incomplete_shards() if shard % jax.process_count() == jax.process_index()
        ]

    def positions(self, shard: int) -> int:
        first = shard * self._per_shard
        return (min(first + self._per_shard, self._sequences) - first) * self.length

    def queries(self, shard: int) -> Queries:
        first = shard * self._per_shard
        return read_queries(self._datastore, first, min(first + self._per_shard, self._sequences))

    def _tile(self, shard: int, key_shard: int) -> epath.Path:
        return self._scratch / f"{shard:06d}.{key_shard:04d}.npy"

    def merged(self) -> dict[int, int]:
        """How many key shards the kept tile of each query shard has been through."""
        done: dict[int, int] = {}
        for file in self._scratch.glob("*.npy") if self._scratch.exists() else ():
            shard, key_shard = (int(part) for part in file.stem.split("."))
            done[shard] = max(done.get(shard, 0), key_shard + 1)
        return done

    def read_tile(self, shard: int, key_shard: int) -> np.ndarray:
        return np.load(io.BytesIO(self._tile(shard, key_shard).read_bytes()))

    def write_tile(self, shard: int, key_shard: int, packed_QxK: np.ndarray) -> None:
        content = io.BytesIO()
        np.save(content, packed_QxK)
        tile = self._tile(shard, key_shard)
        unfinished = tile.with_suffix(".unfinished")
        with writing(tile):
            self._scratch.mkdir(parents=True, exist_ok=True)
            unfinished.write_bytes(content.getbuffer())
            unfinished.replace(tile)
        self.drop_tile(shard, key_shard - 1)

    def drop_tile(self, shard: int, key_shard: int) -> None:
        self._tile(shard, key_shard).unlink(missing_ok=True)


def pieces(
    queries: Queries,
    split: str,
    key_shard: KeyShard,
    plan: Plan,
    before_QxK: np.ndarray | None,
    temperature: float | None,
) -> Iterator[np.ndarray] | Iterator[tuple[SparseDistributions, int]]:
    """One tile, in pieces of a few rows, in order, worked on by as many threads as there are cores.

    Args:
      queries: positions of the split named `split`.
      before_QxK: packed neighbors from the key shards before this one, uint64 [Q, k]; None when it is the first.
      temperature: None when more key shards follow.

    Yields:
      Packed neighbors; or, with a temperature, distributions and how many of their positions lack k neighbors.
    """
    rows = max(1, _NEIGHBORS_AT_ONCE // plan.k)
    # The devices of a mesh search in step with those of other processes: in this thread, one batch after another.
    found_on_mesh_QxK = find_neighbors(key_shard, queries, plan, split) if key_shard.is_on_mesh else None

    def work(start: int):
        part = slice(start, start + rows)
        if found_on_mesh_QxK is None:
            found_QxK = find_neighbors(key_shard, queries[part], plan, split)
        else:
            found_QxK = found_on_mesh_QxK[part]
        packed_QxK = neighbors.merge(None if before_QxK is None else before_QxK[part], found_QxK)
        if temperature is None:
            return packed_QxK
        lacking = int(np.isinf(neighbors.unpack(packed_QxK)[0][:, -1]).sum())
        return _distributions(packed_QxK, queries[part], plan, temperature), lacking

    # NumPy and the searches let other threads run.
    with concurrent.futures.ThreadPoolExecutor(runtime.cpu_count()) as threads:
        yield from threads.map(work, range(0, len(queries), rows))


def make_tiles(splits: list[Split], key_shards: KeyShards, plan: Plan, temperature: float) -> None:
    """All tiles of this process: the innermost work of the stage."""
    count = len(key_shards)
    merged = {split.name: split.merged() for split in splits}
    work = [(split, shard, merged[split.name].get(shard, 0)) for split in splits for shard in split.shards]
    total = count * sum(split.positions(shard) for split, shard, _ in work)
    done = sum(split.positions(shard) * begun for split, shard, begun in work)
    with progress(total, "targets", "positions" if count == 1 else "positions x key shards", done) as bar:
        for number in range(count):
            left = [(split, shard) for split, shard, begun in work if begun <= number]
            # On a mesh no process may stay away while another has queries left.
            idle = ring.most(len(left)) - len(left) if key_shards.are_on_mesh else 0
            for split, shard in left:
                _make_tile(split, shard, key_shards, number, plan, temperature)
                bar.advance(split.positions(shard))
            for _ in range(idle):
                key_shards.open(number).index.search(np.empty((0, key_shards.width), np.float32), plan.k)


def _make_tile(split: Split, shard: int, key_shards: KeyShards, number: int, plan: Plan, temperature: float) -> None:
    """Searches one key shard for one query shard, and writes its tile or, after the last key shard, its targets."""
    before_QxK = split.read_tile(shard, number - 1) if number else None
    is_last = number == len(key_shards) - 1
    done = pieces(
        split.queries(shard), split.name, key_shards.open(number), plan, before_QxK, temperature if is_last else None
    )
    if is_last:
        distributions, lacking = zip(*done, strict=True)
        split.writer.write_shard(shard, distributions, sum(lacking))
        split.drop_tile(shard, number - 1)
    else:
        split.write_tile(shard, number, np.concatenate(list(done)))
