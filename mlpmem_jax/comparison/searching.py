"""Searches of the compared systems: exact over few vectors, with the backend of config.targets over many.

The effort of an approximate search is the least that reaches `config.targets.recall`, measured on queries with known
neighbors.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core.artifacts import Artifact
from mlpmem_jax.core.mesh import barrier
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval import backends, exact_backend, reduction, tuning
from mlpmem_jax.retrieval.backends import Effort, Index, KeySource
from mlpmem_jax.retrieval.key_shards import KeyShards, Search
from mlpmem_jax.retrieval.quality import Sample, contains
from mlpmem_jax.retrieval.queries import sample_queries

EXACT = 500_000  # vectors up to which exact search of many queries costs less than an index
_SAMPLE = 256  # queries on which recall is measured
_TIMED = 12  # queries whose search is timed


class TunedIndex:
    """An index searched with the effort that its recall requires."""

    def __init__(self, index: Index, effort: Effort | None):
        self._index, self._effort = index, effort

    def search(self, queries_QxD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """(squared distances float32 [Q, k], ids int32 [Q, k]), as `backends.Index.search`."""
        return self._index.search(queries_QxD, k, None, self._effort)


def open_key_index(datastore: Artifact, settings: Mapping, mesh: Mesh, folder: epath.Path) -> TunedIndex:
    """Opens the keys of a training datastore as one index.

    Args:
      datastore: the datastore of the training split.
      settings: named as in config.targets.
      mesh: the devices to search on.
      folder: where indices are stored.

    Raises:
      UserError: no search reaches the recall.
    """
    sequences, length, width = datastore.arrays["keys"].shape
    if sequences * length <= EXACT:
        keys_NxD = datastore.read("keys", 0, sequences).reshape(-1, width)
        return TunedIndex(exact_backend.ExactIndex(source_of(keys_NxD), mesh), None)
    search = Search.create(backends.chosen(settings["backend"])[1], settings, mesh)
    folder /= f"keys_{fingerprint(datastore.fingerprint, search)}"
    folder.mkdir(parents=True, exist_ok=True)
    key_shards = KeyShards.prepare(datastore, sequences * length, folder, search, mesh)
    _build_first(lambda: key_shards.open(0), search.backend.is_collective)
    if search.is_exact:
        return TunedIndex(key_shards.open(0).index, None)
    sample = Sample.draw(key_shards, sample_queries(datastore, _SAMPLE), "self", settings["k"])
    trials, place = tuning.reach(key_shards, sample, settings["recall"])
    say(f"kNN-LM: recall {trials[place]}")
    return TunedIndex(key_shards.open(0).index, trials[place].effort)


def open_index(
    source: KeySource, settings: Mapping, k: int, mesh: Mesh, folder: epath.Path, queries_QxD: np.ndarray
) -> TunedIndex:
    """Opens any vectors as one index, searched with the least effort that reaches the recall, or else the greatest.

    Args:
      source: the vectors.
      settings: named as in config.targets.
      k: neighbors per query.
      mesh: the devices to search on.
      folder: where the index is stored; used for these vectors only.
      queries_QxD: float32, a sample of typical queries.
    """
    if source.size <= EXACT:
        return TunedIndex(exact_backend.ExactIndex(source, mesh), None)
    return _open_approximate(source, settings, k, mesh, folder, queries_QxD)


def open_fastest(
    source: KeySource, settings: Mapping, k: int, mesh: Mesh, folder: epath.Path, queries_QxD: np.ndarray
) -> TunedIndex:
    """Opens any vectors as the index that answers a single query sooner: exact, or approximate with the recall.

    `open_index` is for many queries at once, for which exact search pays longer. Arguments as there.
    """
    approximate = _open_approximate(source, settings, k, mesh, folder, queries_QxD)
    if source.size > EXACT:
        return approximate
    exact = TunedIndex(exact_backend.ExactIndex(source, mesh), None)
    seconds = [_seconds_per_query(index, k, queries_QxD) for index in (exact, approximate)]
    say("{}: {:.2g} ms per query exactly, {:.2g} ms with an index".format(folder.name, *(1e3 * s for s in seconds)))
    return exact if seconds[0] <= seconds[1] else approximate


def _seconds_per_query(index: TunedIndex, k: int, queries_QxD: np.ndarray) -> float:
    """The median time of single queries, after one that compiles."""
    times = [time.perf_counter()]
    for query_D in queries_QxD[:_TIMED]:
        index.search(query_D[None], k)
        times.append(time.perf_counter())
    return float(np.median(np.diff(times)[1:]))


def _open_approximate(
    source: KeySource, settings: Mapping, k: int, mesh: Mesh, folder: epath.Path, queries_QxD: np.ndarray
) -> TunedIndex:
    search = Search.create(backends.chosen(settings["backend"])[1], {**settings, "k": k}, mesh)
    backend, width = search.backend, search.dimensions or source.width
    folder.mkdir(parents=True, exist_ok=True)
    searched, projection = source, None
    if search.is_projected:
        projection = reduction.fit(source.read(0, min(source.size, settings["training_sample"])), width)
        searched = KeySource(source.size, width, source.dtype, lambda start, stop: projection(source.read(start, stop)))
    index = _build_first(lambda: backend.open(searched, folder / "index"), backend.is_collective)
    index = search.over_whole_keys(index, projection, source)
    efforts, place = backend.efforts(source.size, width)
    if not efforts:
        return TunedIndex(index, None)
    queries_QxD = np.asarray(queries_QxD[:_SAMPLE], np.float32)
    none_Qx2 = np.zeros((len(queries_QxD), 2), np.int32)
    true_QxK = exact_backend.search_in_blocks(source, None, queries_QxD, k, none_Qx2)[1]
    for effort in efforts[place:]:
        recall = contains(index.search(queries_QxD, k, None, effort)[1], true_QxK).mean()
        if recall >= settings["recall"]:
            break
    say(f"{folder.name}: recall {recall:.3f} with {effort}")
    return TunedIndex(index, effort)


def source_of(vectors_NxD: np.ndarray) -> KeySource:
    """In-memory vectors as a source that backends read."""
    return KeySource(*vectors_NxD.shape, vectors_NxD.dtype, lambda start, stop: vectors_NxD[start:stop])


def _build_first(open_index, is_collective: bool):
    """The result of `open_index`; the first process builds the stored index, the others then read it."""
    if is_collective:
        return open_index()
    if jax.process_index() == 0:
        open_index()
    barrier("index of a comparison built")
    return open_index()


def fingerprint(*parts) -> str:
    """A short hash of everything that an index depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
