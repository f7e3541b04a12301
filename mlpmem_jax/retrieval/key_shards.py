"""Keys of the training split in shards, each with a search index; queries, and what they may not retrieve.

A process holds one shard at a time, so `config.targets.key_shard_rows` bounds its memory, `host_bytes` says to what.
The exact backend holds the shard on the devices of the mesh, each process its part.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval import neighbors, reduction, scann_index
from mlpmem_jax.retrieval.exact import ExactIndex
from mlpmem_jax.retrieval.reduction import Projection, ReducedIndex, RotatedIndex
from mlpmem_jax.retrieval.ring import MeshIndex
from mlpmem_jax.retrieval.scann_index import Options, ScannIndex

_READS_AT_ONCE = 16  # small range reads, which wait for storage more than they work
_MEASURED_AT_ONCE = 1 << 18  # keys of one block of the exact search that approximate ones are compared with

Index = MeshIndex | ReducedIndex | RotatedIndex


@dataclasses.dataclass(frozen=True)
class Queries:
    """Positions of a split that look for neighbors.

    Attributes:
      keys_QxD: float32 [Q, D].
      next_tokens_Q: int32 [Q].
      positions_Q: int64 [Q], place within the split.
      documents_Q: int32 [Q], document within the split.
      base_log_probabilities_Q: float32 [Q], log p_LM(next token); None where the datastore has none.
    """

    keys_QxD: np.ndarray
    next_tokens_Q: np.ndarray
    positions_Q: np.ndarray
    documents_Q: np.ndarray
    base_log_probabilities_Q: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.positions_Q)

    def __getitem__(self, part: slice) -> Queries:
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))
        return Queries(*(None if field is None else field[part] for field in fields))


def read_queries(datastore: Artifact, first: int, last: int) -> Queries:
    """All positions of the sequences `first` to `last`."""
    length = datastore.arrays["next_tokens"].shape[1]
    keys_SxTxD = datastore.read("keys", first, last)
    scored = "base_log_probabilities" in datastore.arrays
    return Queries(
        keys_QxD=keys_SxTxD.reshape(-1, keys_SxTxD.shape[-1]).astype(np.float32),
        next_tokens_Q=datastore.read("next_tokens", first, last).ravel(),
        positions_Q=np.arange(first * length, last * length),
        documents_Q=datastore.read("documents", first, last).ravel(),
        base_log_probabilities_Q=datastore.read("base_log_probabilities", first, last).ravel() if scored else None,
    )


def sample_queries(datastore: Artifact, count: int, seed: int = 0) -> Queries:
    """`count` positions drawn from the whole split, without repetition; all of them when there are no more."""
    sequences, length = datastore.arrays["next_tokens"].shape
    draw = np.random.default_rng(seed).choice(sequences * length, min(count, sequences * length), replace=False)
    draw.sort()

    def drawn_from(sequence: int) -> Queries:
        return read_queries(datastore, sequence, sequence + 1)[draw[draw // length == sequence] % length]

    with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        parts = list(threads.map(drawn_from, np.unique(draw // length).tolist()))
    columns = ([getattr(part, field.name) for part in parts] for field in dataclasses.fields(Queries))
    return Queries(*(None if column[0] is None else np.concatenate(column) for column in columns))


@dataclasses.dataclass(frozen=True)
class KeyShard:
    """One part of the training split's keys, searchable.

    Attributes:
      index: over the keys of this shard; its ids count from 0.
      first_position: place of the first key within the split.
      next_tokens_N: int32 [N], the token that followed each key.
      documents_N: int32 [N], document of each key, never falling.
      is_on_mesh: whether all processes have to search it together.
    """

    index: Index
    first_position: int
    next_tokens_N: np.ndarray
    documents_N: np.ndarray
    is_on_mesh: bool = False

    def excluded(self, queries: Queries, exclude: str) -> np.ndarray:
        """Keys of this shard that queries of the *training* split may not retrieve: [start, stop) int32 [Q, 2].

        Args:
          queries: of the training split.
          exclude: "self" (the query's own position, the paper's rule) or "document" (its whole document).
        """
        if exclude == "document":
            ranges = [np.searchsorted(self.documents_N, queries.documents_Q, side) for side in ("left", "right")]
        else:
            own = queries.positions_Q - self.first_position
            ranges = [np.clip(own + end, 0, len(self.next_tokens_N)) for end in (0, 1)]
        return np.stack(ranges, axis=1).astype(np.int32)


@dataclasses.dataclass(frozen=True)
class Search:
    """How shards are searched; the keys of config.targets of these names.

    Attributes:
      backend: "scann" or "exact".
      k: neighbors that will be asked for.
      search_dimensions: dimensions that candidates are found in; 0 for all that keys have.
      recall_target: of the selection on the devices of a mesh, see `ring.search_program`.
      training_sample: keys that ScaNN and the reduction of dimensions are trained on.
      leaves, leaves_to_search, reorder: see `scann_index.Options.derive`.
    """

    backend: str
    k: int
    search_dimensions: int = 0
    recall_target: float = 1.0
    training_sample: int = 100_000
    leaves: int = 0
    leaves_to_search: int = 0
    reorder: int = 0

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Search:
        """The search that settings named like those of config.targets ask for; `backend` is one of the two."""
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls) if field.name in settings})

    @property
    def candidates(self) -> int:
        """How many neighbors the index is asked for."""
        return reduction.candidates(self.k) if self.search_dimensions else self.k


def host_bytes(rows: int, width: int, key_bytes: int, search: Search, processes: int = 1) -> int:
    """The most memory, in bytes, that the keys of a shard take in a process.

    ScaNN's was measured (docs/neighbors.md): while an index is loaded, the keys in float32, one and a half bytes of
    hashes for each number, and 96 bytes more a key; while it is trained, 50 bytes for each number of the sample and
    1,200 more a key. Where candidates come from fewer dimensions, whole keys are held beside the index.

    Args:
      rows: keys of the shard.
      width: numbers in a key.
      key_bytes: bytes of one number in the datastore.
      search: how shards are searched.
      processes: that the exact backend spreads a shard over.
    """
    searched = search.search_dimensions or width
    if search.backend == "scann":
        sample = min(search.training_sample, rows)
        index = max(int(rows * (5.5 * searched + 96)), sample * (50 * searched + 1200))
    else:
        index = rows * 8 * searched // processes
    return index + (rows * width * key_bytes if search.search_dimensions else 0)


class KeyShards:
    """All key shards of a training datastore. One index is in memory at a time; each is built once and kept."""

    def __init__(self, datastore: Artifact, rows: int, scratch: epath.Path, search: Search, mesh: Mesh | None = None):
        """Divides the sequences evenly over the fewest shards of at most `rows` keys (and at least one sequence).

        Args:
          datastore: of the training split.
          rows: keys in one shard.
          scratch: existing folder for what is built.
          search: how shards are searched.
          mesh: devices over which the exact backend spreads a shard; None with another backend.
        """
        sequences, self._length = datastore.arrays["next_tokens"].shape
        count = min(sequences, -(-sequences * self._length // rows))
        self.bounds = [sequences * shard // count for shard in range(count + 1)]
        self._datastore, self._scratch, self._search, self._mesh = datastore, scratch, search, mesh
        self._opened: tuple[int, KeyShard] | None = None
        self.width, self._dtype = datastore.arrays["keys"].shape[2], np.dtype(datastore.arrays["keys"].dtype)
        self.searched_width = search.search_dimensions or self.width
        self._options: Options | None = None  # of the search, where they are not those of the build
        is_projected = search.search_dimensions or search.backend == "scann"
        self._projection = self._fit_projection() if is_projected else None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    @property
    def are_on_mesh(self) -> bool:
        """Whether several devices search in step, so that all processes have to open and search the shards together."""
        return self._mesh is not None and self._mesh.size > 1

    @property
    def candidates(self) -> int:
        """How many neighbors the index of a shard is asked for."""
        return self._search.candidates

    @property
    def are_exact(self) -> bool:
        """Whether the index of a shard misses no neighbor."""
        search = self._search
        return search.backend == "exact" and not search.search_dimensions and search.recall_target == 1

    @property
    def variance_kept(self) -> float:
        """The share of the keys' variance in the dimensions that are searched."""
        return self._projection.variance_kept if self._projection else 1.0

    def efforts(self) -> list[Options]:
        """Ways to search ScaNN's indices, the cheapest first; one where the settings say how, none of another backend.

        They are made for the first shard; all have about as many keys.
        """
        if self._search.backend != "scann":
            return []
        search, size = self._search, self.rows(0)
        return self._build_options(size).efforts(
            size, self.searched_width, search.candidates, leaves=not search.leaves_to_search, reorder=not search.reorder
        )

    def use(self, options: Options) -> None:
        """Searches every shard as the options say from now on; those that the index was built with stay."""
        self._options = options
        if self._opened is not None:
            shard, key_shard = self._opened
            self._opened = (shard, dataclasses.replace(key_shard, index=key_shard.index.with_options(options)))

    def _build_options(self, size: int) -> Options:
        search = self._search
        return Options.derive(
            size, search.candidates, search.leaves, search.leaves_to_search, search.reorder, search.training_sample
        )

    def _fit_projection(self) -> Projection:
        """Fitted by the first process alone, on sequences at even distances, and kept."""
        file = self._scratch / "projection.npy"
        if jax.process_index() == 0 and not file.exists():
            count = min(self.bounds[-1], -(-self._search.training_sample // self._length))
            chosen = np.linspace(0, self.bounds[-1] - 1, count).astype(int).tolist()
            with concurrent.futures.ThreadPoolExecutor(_READS_AT_ONCE) as threads:
                sample = list(threads.map(lambda row: self._datastore.read("keys", row, row + 1)[0], chosen))
            with writing(file):
                reduction.fit(np.concatenate(sample), self.searched_width).save(file)
        barrier("targets projection fitted")
        return Projection.load(file)

    def rows(self, shard: int) -> int:
        """How many keys the shard has."""
        return (self.bounds[shard + 1] - self.bounds[shard]) * self._length

    def keys(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Keys `start` to `stop` of a shard as the datastore has them, [N, D]."""
        return self._read(shard, start, stop, self.width, self._dtype, lambda keys_NxD: keys_NxD)

    def _searched_keys(self, shard: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """What is searched of the keys `start` to `stop`: float32 [N, D], or [N, M] of the projection."""
        project = self._projection or (lambda keys_NxD: keys_NxD)
        return self._read(shard, start, stop, self.searched_width, np.float32, project)

    def _read(self, shard: int, start: int, stop: int | None, width: int, dtype, convert) -> np.ndarray:
        """`convert(keys)`, read and converted a stored shard of the datastore at a time: [N, width] of `dtype`."""
        first, stop = self.bounds[shard] * self._length, self.rows(shard) if stop is None else stop
        converted = np.empty((stop - start, width), dtype)
        step = self._datastore.arrays["keys"].rows_per_shard * self._length
        for begin in range(start, stop, step):
            end = min(begin + step, stop)
            sequences = (first + begin) // self._length, -(-(first + end) // self._length)
            keys_NxD = self._datastore.read("keys", *sequences).reshape(-1, self.width)
            skipped = first + begin - sequences[0] * self._length
            converted[begin - start : end - start] = convert(keys_NxD[skipped : skipped + end - begin])
        return converted

    def exact_neighbors(
        self, shard: int, queries_QxD: np.ndarray, k: int, excluded_Qx2: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """What an exact search in all dimensions returns, a block of keys at a time; as `ExactIndex.search`."""
        if self._mesh is not None:
            return self._on_mesh(shard, self.width, self.keys, 1.0).search(queries_QxD, k, excluded_Qx2)
        best, size = None, self.rows(shard)
        for start in range(0, size, _MEASURED_AT_ONCE):
            block = ExactIndex(self.keys(shard, start, min(start + _MEASURED_AT_ONCE, size)))
            distances_QxK, ids_QxK = block.search(queries_QxD, k, excluded_Qx2 - start)
            best = neighbors.merge(best, neighbors.pack(distances_QxK, ids_QxK + np.int32(start)))
        return neighbors.unpack(best)

    def open(self, shard: int) -> KeyShard:
        """The shard with its index, loaded where it was built before, otherwise built and saved."""
        if self._opened is None or self._opened[0] != shard:
            self._opened = None  # frees the memory of the one before
            first, last = self.bounds[shard : shard + 2]
            index = self._index(shard)
            key_shard = KeyShard(
                index=self._in_key_space(index, shard),
                first_position=first * self._length,
                next_tokens_N=self._datastore.read("next_tokens", first, last).ravel(),
                documents_N=self._datastore.read("documents", first, last).ravel(),
                is_on_mesh=self.are_on_mesh,
            )
            self._opened = (shard, key_shard)
        return self._opened[1]

    def _in_key_space(self, index: MeshIndex | ScannIndex, shard: int) -> Index:
        """The index for queries that are keys, whatever it searches itself."""
        if self._projection is None:
            return index
        if self._search.search_dimensions:
            return ReducedIndex(index, self._projection, self.keys(shard))
        return RotatedIndex(index, self._projection)

    def _index(self, shard: int) -> MeshIndex | ScannIndex:
        if self._search.backend == "scann":
            return self._load_or_build(shard)
        # Nothing is built that would be worth keeping.
        return self._on_mesh(shard, self.searched_width, self._searched_keys, self._search.recall_target)

    def _on_mesh(self, shard: int, width: int, read, recall_target: float) -> MeshIndex:
        return MeshIndex(
            self.rows(shard), width, self._dtype, functools.partial(read, shard), self._mesh, recall_target
        )

    def _load_or_build(self, shard: int) -> ScannIndex:
        size = self.rows(shard)
        options = self._build_options(size)
        folder = self._scratch / f"index_{shard:04d}"
        complete = folder.parent / f"{folder.name}.complete"
        with tempfile.TemporaryDirectory() as local:  # stays empty where the folder itself is local
            if not complete.exists():
                say(f"targets: building index {shard + 1} of {len(self)}: {size:,} keys, {options}")
                if folder.exists():
                    folder.rmtree()
                with writing(folder):
                    folder.mkdir(parents=True)
                    read = functools.partial(self._searched_keys, shard)
                    target = local if _is_remote(folder) else str(folder)
                    scann_index.write(target, size, self.searched_width, read, options)
                    for file in epath.Path(local).iterdir():
                        file.copy(folder / file.name)
                    complete.write_text("")
            elif _is_remote(folder):
                for file in folder.iterdir():
                    file.copy(epath.Path(local) / file.name)
            return ScannIndex.load(local if _is_remote(folder) else str(folder), size, self._options or options)


@contextlib.contextmanager
def writing(path: epath.Path):
    """Turns errors of writing to the scratch folder, a full disk for instance, into one that says what to do.

    Raises:
      ArtifactError: `path` could not be written.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:  # ScaNN raises RuntimeError
        raise ArtifactError(
            f"{path}: could not be written: {error}. What was complete before is kept: make room (or fix access) and "
            "run the same command again"
        ) from error


def _is_remote(path: epath.Path) -> bool:
    """ScaNN reads and writes local files alone."""
    return "://" in str(path)
