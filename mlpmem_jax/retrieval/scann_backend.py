"""Approximate nearest neighbors with ScaNN: a tree of clusters, asymmetric hashing, exact reordering in float32.

`scann_index` builds the index. Searches may use any number of threads.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Mapping

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core import native_output
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.storage import is_remote
from mlpmem_jax.retrieval import exact_backend, neighbors, scann_index
from mlpmem_jax.retrieval.backends import KeySource, Needs
from mlpmem_jax.retrieval.scann_index import Options
from mlpmem_jax.retrieval.scratch import writing

# In multiples of the derived values.
_LEAF_FACTORS = (0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_REORDER_FACTORS = (1, 2, 4)
_ROWS_PER_CALL = 256
_RETRIED_NEIGHBORS = 1 << 22  # neighbors per retry: 32 MiB of ids and distances
_GROWTH = 4  # factor by which a retry for missing neighbors asks for more


@dataclasses.dataclass(frozen=True)
class Backend:
    """ScaNN on the hosts' CPUs.

    Attributes:
      k: neighbors per query of an index.
      training_sample, leaves, leaves_to_search, reorder: as in `Options.derive`.
    """

    k: int
    training_sample: int = 100_000
    leaves: int = 0
    leaves_to_search: int = 0
    reorder: int = 0

    is_collective = False
    is_exact = False
    is_rotated = True
    remedies = "a larger config.targets.training_sample, other config.targets.leaves, backend=exact"

    @classmethod
    def unavailable(cls) -> str:
        return unavailable()

    @classmethod
    def create(cls, settings: Mapping, k: int, mesh: Mesh | None = None) -> Backend:
        names = {field.name for field in dataclasses.fields(cls)} - {"k"}
        return cls(k, **{name: settings[name] for name in names & set(settings)})

    def options(self, rows: int) -> Options:
        """How an index of `rows` keys is built, and how it is searched first."""
        return Options.derive(rows, self.k, self.leaves, self.leaves_to_search, self.reorder, self.training_sample)

    def needs(self, rows: int, width: int, key_bytes: int, processes: int) -> Needs:
        # Measured (docs/neighbors.md). A loaded index: float32 keys, one and a half bytes of hashes per number, and 96
        # more bytes per key. During training: 18 bytes per number of the sample, 27 per number that hashes are trained
        # on, and 1,200 per key.
        sample = min(self.training_sample, rows)
        hashed = min(sample, scann_index.HASHING_SAMPLE)
        trained = sample * (18 * width + 1200) + 27 * hashed * width
        loaded = int(rows * (5.5 * width + 96))
        stored = rows * (5 * width + 4)  # float32 keys, a byte of hash per number, a cluster
        return Needs(
            max(trained, loaded + exact_backend.search_bytes(rows, width, key_bytes)),
            disk=stored + 5 * sample * width,
            stored=stored,
        )

    def flops(self, rows: int, width: int, queries: int) -> float:
        """Counts comparing each key and query with the centers of all leaves, one table lookup and addition per
        dimension of each key in the searched leaves, and the distances of the reordered candidates. Training the
        centers on a sample is not counted."""
        options = self.options(rows)
        scanned = rows * options.leaves_to_search / options.leaves
        query = options.leaves * 2.0 * width + scanned * width + self.k * options.reorder * 2.0 * width
        return rows * options.leaves * 2.0 * width + queries * query

    def efforts(self, rows: int, width: int) -> tuple[list[Options], int]:
        """Searches with more leaves and candidates than derived, or fewer leaves; explicit settings are not varied."""
        first = self.options(rows)
        choices = {
            dataclasses.replace(
                first,
                leaves_to_search=min(math.ceil(first.leaves_to_search * more_leaves), first.leaves),
                reorder=round(first.reorder * more_candidates, 2),
            )
            for more_leaves in ((1,) if self.leaves_to_search else _LEAF_FACTORS)
            for more_candidates in ((1,) if self.reorder or more_leaves < 1 else _REORDER_FACTORS)
        }
        efforts = sorted(choices, key=lambda options: (options.cost(rows, width, self.k), options.leaves_to_search))
        return efforts, efforts.index(first)

    def open(self, keys: KeySource, folder: epath.Path) -> ScannIndex:
        options = self.options(keys.size)
        complete = folder.parent / f"{folder.name}.complete"
        with _local_folder(folder) as local:
            if not complete.exists():
                say(f"targets: building {folder.name}: {keys.size:,} keys, {options}")
                if folder.exists():
                    folder.rmtree()
                with writing(folder):
                    folder.mkdir(parents=True)
                    scann_index.write(local, keys.size, keys.width, keys.read, options)
                    if is_remote(folder):
                        for file in local.iterdir():
                            file.copy(folder / file.name)
                    complete.write_text("")
            elif is_remote(folder):
                for file in folder.iterdir():
                    file.copy(local / file.name)
            return ScannIndex.load(local, keys.size, options)


@contextlib.contextmanager
def _local_folder(folder: epath.Path) -> Iterator[epath.Path]:
    """The folder itself if it is local, else a temporary one, because ScaNN reads and writes only local files."""
    if not is_remote(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as local:
        yield epath.Path(local)


@functools.cache
def unavailable() -> str:
    """Why ScaNN cannot be used, or "" if it can; its wheels are only for Linux on x86-64."""
    if importlib.util.find_spec("scann") is None:
        return "is not installed (its wheels are for Linux on x86-64)"
    try:
        scann_index.scann()
    except Exception as error:  # an incompatible native library may raise anything
        return f"is installed but cannot be imported ({type(error).__name__}: {str(error).splitlines()[0][:120]})"
    return ""


class ScannIndex:
    """A ScaNN searcher over N keys."""

    def __init__(self, searcher, size: int, options: Options):
        self._searcher, self.size, self._options = searcher, size, options

    @classmethod
    def build(cls, keys_NxD: np.ndarray, options: Options) -> ScannIndex:
        """Builds the index of in-memory keys, float32 [N, D]."""
        with tempfile.TemporaryDirectory() as folder:
            scann_index.write(folder, *keys_NxD.shape, lambda start, stop: keys_NxD[start:stop], options)
            return cls.load(folder, len(keys_NxD), options)

    @classmethod
    def load(cls, folder, size: int, options: Options) -> ScannIndex:
        """Reads what `scann_index.write` wrote."""
        with native_output.silenced_standard_error():
            return cls(scann_index.scann().load_searcher(str(folder)), size, options)

    def search(
        self,
        queries_QxD: np.ndarray,
        k: int,
        excluded_Qx2: np.ndarray | None = None,
        effort: Options | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Approximately the k nearest keys of each query, as `backends.Index.search`. Releases the GIL."""
        options = effort or self._options
        if excluded_Qx2 is None:
            excluded_Qx2 = np.zeros((len(queries_QxD), 2), np.int32)
        longest = int(np.max(excluded_Qx2[:, 1] - excluded_Qx2[:, 0], initial=0))
        distances_QxK = np.empty((len(queries_QxD), k), np.float32)
        ids_QxK = np.empty((len(queries_QxD), k), np.int32)
        # Most queries have few of their k nearest excluded. Queries that lack neighbors are searched again, asking for
        # more of them, or searching more leaves if the leaves had no more.
        pending = [(np.arange(len(queries_QxD)), min(longest, k), options.leaves_to_search)]
        while pending:
            rows, extra, leaves = pending.pop()
            step = max(1, min(_ROWS_PER_CALL, _RETRIED_NEIGHBORS // (k + extra)))
            has_ended_Q = np.empty(len(rows), bool)
            for start in range(0, len(rows), step):
                part = slice(start, start + step)
                distances_QxK[rows[part]], ids_QxK[rows[part]], has_ended_Q[part] = self._search_once(
                    queries_QxD[rows[part]], k, extra, leaves, options.reorder, excluded_Qx2[rows[part]]
                )
            lacks_Q = np.isinf(distances_QxK[rows, -1])
            if leaves < options.leaves and (lacks_Q & has_ended_Q).any():
                pending.append((rows[lacks_Q & has_ended_Q], extra, min(options.leaves, _GROWTH * leaves)))
            if extra < longest and (lacks_Q & ~has_ended_Q).any():
                pending.append((rows[lacks_Q & ~has_ended_Q], min(longest, _GROWTH * extra), leaves))
        return distances_QxK, ids_QxK

    def _search_once(self, queries_QxD, k: int, extra: int, leaves: int, reorder: float, excluded_Qx2):
        """(distances [Q, k], ids [Q, k], whether the leaves had fewer than k + extra keys, bool [Q])."""
        wanted = min(k + extra, self.size)
        ids_QxJ, distances_QxJ = self._searcher.search_batched(
            np.ascontiguousarray(queries_QxD, np.float32),
            final_num_neighbors=wanted,
            pre_reorder_num_neighbors=round(wanted * reorder),
            leaves_to_search=leaves,
        )
        ids_QxJ = ids_QxJ.view(np.int32)
        usable_QxJ = np.isfinite(distances_QxJ)  # ScaNN fills missing neighbors with NaN
        has_ended_Q = ~usable_QxJ.all(axis=1)
        usable_QxJ &= (ids_QxJ < excluded_Qx2[:, :1]) | (ids_QxJ >= excluded_Qx2[:, 1:])
        usable_QxJ &= np.cumsum(usable_QxJ, axis=1, dtype=np.int32) <= k
        if np.count_nonzero(usable_QxJ) == len(ids_QxJ) * k:
            return distances_QxJ[usable_QxJ].reshape(-1, k), ids_QxJ[usable_QxJ].reshape(-1, k), has_ended_Q
        padding = ((0, 0), (0, max(0, k - wanted)))
        distances_QxJ = np.pad(np.where(usable_QxJ, distances_QxJ, np.inf), padding, constant_values=np.inf)
        packed_QxJ = neighbors.pack(distances_QxJ, np.pad(ids_QxJ, padding))
        return *neighbors.unpack(neighbors.smallest(packed_QxJ, k)), has_ended_Q
