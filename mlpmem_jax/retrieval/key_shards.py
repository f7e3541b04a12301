"""Keys of the training split in shards, each with a search index; queries, and what they may not retrieve."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import pathlib
import tempfile

import numpy as np
from etils import epath

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval import scann_index
from mlpmem_jax.retrieval.exact import ExactIndex
from mlpmem_jax.retrieval.scann_index import ScannIndex

_READS_AT_ONCE = 16  # small range reads, which wait for storage more than they work

Index = ExactIndex | ScannIndex


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
    """

    index: Index
    first_position: int
    next_tokens_N: np.ndarray
    documents_N: np.ndarray

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


class KeyShards:
    """All key shards of a training datastore. One index is in memory at a time; each is built once and kept."""

    def __init__(self, datastore: Artifact, rows: int, scratch: epath.Path, backend: str, k: int, options: dict):
        """Divides the sequences evenly over the fewest shards of at most `rows` keys (and at least one sequence).

        Args:
          datastore: of the training split.
          rows: keys in one shard.
          scratch: folder for the built indices.
          backend: "scann" or "exact".
          k: neighbors that will be asked for.
          options: what `scann_index.Options.derive` takes beside the number of keys and k.
        """
        sequences, self._length = datastore.arrays["next_tokens"].shape
        count = min(sequences, -(-sequences * self._length // rows))
        self.bounds = [sequences * shard // count for shard in range(count + 1)]
        self._datastore, self._scratch, self._backend = datastore, scratch, backend
        self._k, self._options = k, options
        self._opened: tuple[int, KeyShard] | None = None

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def keys(self, shard: int) -> np.ndarray:
        """float32 [N, D]."""
        first, last = self.bounds[shard : shard + 2]
        keys_NxD = np.empty(((last - first) * self._length, self._datastore.arrays["keys"].shape[2]), np.float32)
        step = self._datastore.arrays["keys"].rows_per_shard
        for start in range(first, last, step):
            part = self._datastore.read("keys", start, min(start + step, last))
            offset = (start - first) * self._length
            keys_NxD[offset : offset + part.shape[0] * self._length] = part.reshape(-1, part.shape[-1])
        return keys_NxD

    def open(self, shard: int) -> KeyShard:
        """The shard with its index, loaded where it was built before, otherwise built and saved."""
        if self._opened is None or self._opened[0] != shard:
            self._opened = None  # frees the memory of the one before
            first, last = self.bounds[shard : shard + 2]
            key_shard = KeyShard(
                index=self._load_or_build(shard, (last - first) * self._length),
                first_position=first * self._length,
                next_tokens_N=self._datastore.read("next_tokens", first, last).ravel(),
                documents_N=self._datastore.read("documents", first, last).ravel(),
            )
            self._opened = (shard, key_shard)
        return self._opened[1]

    def _load_or_build(self, shard: int, size: int) -> Index:
        if self._backend == "exact":
            return ExactIndex(self.keys(shard))  # nothing is built that would be worth keeping
        options = scann_index.Options.derive(size, self._k, **self._options)
        folder = self._scratch / f"index_{shard:04d}"
        complete = folder.parent / f"{folder.name}.complete"
        if complete.exists():
            with tempfile.TemporaryDirectory() as copy:
                return ScannIndex.load(_local(folder, pathlib.Path(copy)), size, options)
        say(f"targets: building index {shard + 1} of {len(self)}: {size:,} keys, {options}")
        index = ScannIndex.build(self.keys(shard), options)
        if folder.exists():
            folder.rmtree()
        with writing(folder), tempfile.TemporaryDirectory() as temporary:
            folder.mkdir(parents=True)
            index.save(temporary if _is_remote(folder) else str(folder))
            for file in epath.Path(temporary).iterdir():
                file.copy(folder / file.name)
            complete.write_text("")
        return index


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
    return "://" in str(path)


def _local(folder: epath.Path, copy: pathlib.Path) -> str:
    """A local folder with the same files: ScaNN reads and writes local files alone."""
    if not _is_remote(folder):
        return str(folder)
    for file in folder.iterdir():
        file.copy(copy / file.name)
    return str(copy)
