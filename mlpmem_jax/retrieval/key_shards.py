"""The training split's keys in shards, each with a search index, and the keys that queries must not retrieve.

A process holds one shard at a time, so `config.targets.key_shard_rows` bounds its memory.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.retrieval import exact_backend, neighbors, reduction
from mlpmem_jax.retrieval.backends import Backend, Effort, Index, KeySource, Needs
from mlpmem_jax.retrieval.chunks import in_chunks
from mlpmem_jax.retrieval.queries import Queries, sample_keys
from mlpmem_jax.retrieval.reduction import Projection, ReducedIndex, RotatedIndex


@dataclasses.dataclass(frozen=True)
class Search:
    """How shards are searched.

    Attributes:
      backend: the backend with its settings, which returns `candidates(k, dimensions)` neighbors.
      dimensions: number of principal components in which candidates are searched; 0 for all dimensions.
      training_sample: number of keys on which the projection is fitted.
    """

    backend: Backend
    dimensions: int = 0
    training_sample: int = 100_000

    @classmethod
    def create(cls, backend: type[Backend], settings: Mapping, mesh: Mesh | None = None) -> Search:
        """The search described by settings named as in config.targets."""
        dimensions = settings.get("search_dimensions", 0)
        return cls(
            backend.create(settings, candidates(settings["k"], dimensions), mesh),
            dimensions,
            settings.get("training_sample", 100_000),
        )

    def flops(self, rows: int, width: int, queries: int) -> float:
        """FLOPs of building the index of a shard of keys and of running `queries` queries."""
        if not self.dimensions:
            return self.backend.flops(rows, width, queries)
        project = (rows + queries) * 2.0 * width * self.dimensions
        whole_distances = queries * 2.0 * width * self.backend.k
        return project + self.backend.flops(rows, self.dimensions, queries) + whole_distances

    def needs(self, rows: int, width: int, key_bytes: int, processes: int) -> Needs:
        """The needs of a process for the index of a shard of keys, as `Backend.needs`; without whole keys."""
        return self.backend.needs(rows, self.dimensions or width, key_bytes, processes)

    def over_whole_keys(self, index: Index, projection: Projection | None, keys: KeySource) -> Index:
        """The index with whole keys as queries, even if it searches a projection of `keys`."""
        if projection is None:
            return index
        if self.dimensions:
            return ReducedIndex(index, projection, keys.read(0, keys.size))
        return RotatedIndex(index, projection)

    @property
    def is_projected(self) -> bool:
        """Whether a projection of the keys is searched instead of the keys."""
        return bool(self.dimensions) or self.backend.is_rotated

    @property
    def is_exact(self) -> bool:
        """Whether no neighbor is ever missed."""
        return self.backend.is_exact and not self.dimensions


def candidates(k: int, dimensions: int) -> int:
    """How many neighbors to request from an index for k neighbors, when searching `dimensions` dimensions (0: all)."""
    return reduction.candidates(k) if dimensions else k


def shard_count(sequences: int, length: int, rows: int) -> int:
    """The smallest number of shards of at most `rows` keys (and at least one sequence) each."""
    return min(sequences, -(-sequences * length // rows))


@dataclasses.dataclass(frozen=True)
class KeyPositions:
    """The positions of the training split whose keys are in one shard; their ids count from 0.

    Attributes:
      first_position: position of the first key within the split.
      next_tokens_N: int32 [N], the token that follows each key.
      documents_N: int32 [N], the document of each key, ascending.
    """

    first_position: int
    next_tokens_N: np.ndarray
    documents_N: np.ndarray

    def packed(self, distances_QxK: np.ndarray, ids_QxK: np.ndarray) -> np.ndarray:
        """Neighbors with their next tokens instead of their ids, packed as `neighbors.pack` does: uint64 [Q, k]."""
        return neighbors.pack(distances_QxK, self.next_tokens_N[ids_QxK])

    def excluded(self, queries: Queries, exclude: str) -> np.ndarray:
        """Keys of this shard that queries of the *training* split must not retrieve: [start, stop) int32 [Q, 2].

        Args:
          queries: queries of the training split.
          exclude: "self" (the query's own position, the paper's rule) or "document" (its whole document).
        """
        if exclude == "document":
            ranges = [np.searchsorted(self.documents_N, queries.documents_Q, side) for side in ("left", "right")]
        else:
            own_Q = queries.positions_Q - self.first_position
            ranges = [np.clip(own_Q + end, 0, len(self.next_tokens_N)) for end in (0, 1)]
        return np.stack(ranges, axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class KeyShard(KeyPositions):
    """One searchable shard of the training split's keys.

    Attributes:
      index: the index of this shard's keys.
    """

    index: Index

    def search(
        self, queries: Queries, k: int, exclude: str | None, effort: Effort | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys: (squared distances float32 [Q, k], ids int32 [Q, k]), as `backends.Index.search`.

        Args:
          queries: queries of any split.
          k: neighbors per query.
          exclude: as in `excluded` if the queries are of the training split, else None.
          effort: the search effort.
        """
        excluded_Qx2 = self.excluded(queries, exclude) if exclude else None
        return self.index.search(queries.keys_QxD, k, excluded_Qx2, effort)

    def nearest(self, queries: Queries, k: int, exclude: str | None, effort: Effort | None = None) -> np.ndarray:
        """The k nearest keys, packed (distance, next token) as `neighbors.pack` does: uint64 [Q, k]."""
        distances_QxK, ids_QxK = self.search(queries, k, exclude, effort)
        return self.packed(distances_QxK, ids_QxK)


@dataclasses.dataclass
class KeyShards:
    """All key shards of a training datastore. One index is in memory at a time; each is built once and stored.

    Attributes:
      datastore: the datastore of the training split.
      bounds: shard s has the sequences `bounds[s]` to `bounds[s + 1]`.
      search: how shards are searched.
      scratch: an existing folder for built indices.
      mesh: devices for a collective search; None if each process searches by itself.
      projection: the projection that is searched; None to search the keys themselves.
    """

    datastore: Artifact
    bounds: Sequence[int]
    search: Search
    scratch: epath.Path
    mesh: Mesh | None = None
    projection: Projection | None = None
    _opened: dict[int, KeyShard] = dataclasses.field(default_factory=dict)

    @classmethod
    def prepare(
        cls, datastore: Artifact, rows: int, scratch: epath.Path, search: Search, mesh: Mesh | None = None
    ) -> KeyShards:
        """Divides the sequences evenly into the fewest shards of at most `rows` keys (and at least one sequence), and
        fits the projection if the search needs one. All processes must call it together."""
        sequences, length = datastore.arrays["next_tokens"].shape
        count = shard_count(sequences, length, rows)
        bounds = [sequences * shard // count for shard in range(count + 1)]
        shared = mesh if search.backend.is_collective else None
        key_shards = cls(datastore, bounds, search, scratch, shared)
        if search.is_projected:
            key_shards.projection = _fit_projection(
                datastore, scratch / "projection.npy", search.training_sample, key_shards.searched_width
            )
        return key_shards

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def width(self) -> int:
        """Dimensions of a key."""
        return self.datastore.arrays["keys"].shape[2]

    @property
    def searched_width(self) -> int:
        """Dimensions of a key that are searched."""
        return self.search.dimensions or self.width

    @property
    def variance_kept(self) -> float:
        """The share of the keys' variance in the searched dimensions."""
        return self.projection.variance_kept if self.projection else 1.0

    @property
    def _length(self) -> int:
        return self.datastore.arrays["keys"].shape[1]

    def rows(self, shard: int) -> int:
        """The number of keys in a shard."""
        return (self.bounds[shard + 1] - self.bounds[shard]) * self._length

    def keys(self, shard: int) -> KeySource:
        """The keys of a shard as stored in the datastore."""
        return self._source(shard, self.width, None)

    def efforts(self) -> tuple[Sequence[Effort], int]:
        """Efforts, as in `Backend.efforts`, for the first shard; all shards have about the same number of keys."""
        return self.search.backend.efforts(self.rows(0), self.searched_width)

    def open(self, shard: int) -> KeyShard:
        """Opens a shard with its index, which is loaded if it exists, else built and saved."""
        if shard not in self._opened:
            self._opened.clear()  # frees the memory of the previous shard
            self._opened[shard] = KeyShard(**vars(self.positions(shard)), index=self._index(shard))
        return self._opened[shard]

    def positions(self, shard: int) -> KeyPositions:
        """The positions of a shard's keys, without its index."""
        first, stop = self.bounds[shard : shard + 2]
        return KeyPositions(
            first_position=first * self._length,
            next_tokens_N=self.datastore.read("next_tokens", first, stop).ravel(),
            documents_N=self.datastore.read("documents", first, stop).ravel(),
        )

    def search_shard(
        self, shard: int, queries: Queries, k: int, exclude: str | None, effort: Effort | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `KeyShard.search`, on all cores.

        A collective search runs in this thread, in lockstep with other processes.
        """
        key_shard = self.open(shard)
        if self.search.backend.is_collective:
            return key_shard.search(queries, k, exclude, effort)
        parts = in_chunks(lambda part: key_shard.search(queries[part], k, exclude, effort), len(queries), k)
        distances_QxK, ids_QxK = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return distances_QxK, ids_QxK

    def exact_neighbors(
        self, shard: int, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """The result of an exact search in all dimensions, as `backends.Index.search`."""
        return exact_backend.search_in_blocks(self.keys(shard), self.mesh, queries_QxD, k, excluded_Qx2)

    def _index(self, shard: int) -> Index:
        """The index, which takes whole keys as queries even if it searches a projection."""
        source = self._source(shard, self.searched_width, self.projection)
        index = self.search.backend.open(source, self.scratch / f"index_{shard:04d}")
        return self.search.over_whole_keys(index, self.projection, self.keys(shard))

    def _source(self, shard: int, width: int, convert: Callable[[np.ndarray], np.ndarray] | None) -> KeySource:
        dtype = np.dtype(self.datastore.arrays["keys"].dtype)
        read = functools.partial(self._read, shard, width, np.dtype(np.float32) if convert else dtype, convert)
        return KeySource(self.rows(shard), width, dtype, read)

    def _read(self, shard: int, width: int, dtype, convert, start: int, stop: int) -> np.ndarray:
        """Keys `start` to `stop` of a shard, read and converted one stored datastore shard at a time."""
        first = self.bounds[shard] * self._length
        converted_NxD = np.empty((stop - start, width), dtype)
        step = self.datastore.arrays["keys"].rows_per_shard * self._length
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            sequences = (first + begin) // self._length, -(-(first + end) // self._length)
            keys_NxD = self.datastore.read("keys", *sequences).reshape(-1, self.width)
            skipped = first + begin - sequences[0] * self._length
            keys_NxD = keys_NxD[skipped : skipped + end - begin]
            converted_NxD[begin - start : end - start] = convert(keys_NxD) if convert else keys_NxD
        return converted_NxD


def _fit_projection(datastore: Artifact, file: epath.Path, sample: int, dimensions: int) -> Projection:
    """Fits the projection on evenly spaced sequences, on the first process only, and stores it."""
    if jax.process_index() == 0 and not file.exists():
        reduction.fit(sample_keys(datastore, sample), dimensions).save(file)
    barrier("targets projection fitted")
    return Projection.load(file)
