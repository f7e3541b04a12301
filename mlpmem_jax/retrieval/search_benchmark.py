"""Compares searches on the stored keys of a finished datastore: recall, quality of distributions, and rate.

Runs the code of stage `targets` on one shard of keys: both backends in all dimensions and in fewer, with ScaNN at the
effort that reaches `config.targets.recall`; and FAISS with the reference implementation's settings (extra `bench`).
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable

import jax
import ml_collections
import numpy as np
from etils import epath

from mlpmem_jax.core import host
from mlpmem_jax.core.artifacts import Artifact, open_artifact
from mlpmem_jax.core.benchmark_rows import row, seconds_by_round
from mlpmem_jax.core.config import SEARCH_BACKENDS
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.mesh import make_mesh
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval import backends, ring, tuning
from mlpmem_jax.retrieval.backends import Effort
from mlpmem_jax.retrieval.chunks import in_chunks
from mlpmem_jax.retrieval.key_shards import KeyShards, Search
from mlpmem_jax.retrieval.quality import Sample, contains
from mlpmem_jax.retrieval.queries import Queries, read_queries, sample_queries
from mlpmem_jax.retrieval.targets_benchmark import reference_index

KEYS = 524_288  # maximum number of keys, the first of the training split
RECALL_POSITIONS, TIMED_POSITIONS = 512, 2048
_FEWER_DIMENSIONS = (2, 4)  # divisors of the keys' width
_LONG_DOCUMENT = 10_000  # positions
_NEARLY = 0.01  # recall difference that is accepted
_ROUNDS = 7
_TEMPERATURE = 0.15  # in median distances to the k neighbors


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail); none for a workdir without a datastore."""
    folder = epath.Path(config.workdir) / "datastore" / "train"
    if not folder.exists():
        say(f"search: no rows, {folder} does not exist; set --config.workdir to one with a finished datastore")
        return []
    datastore, k = open_artifact(folder, "datastore"), config.targets.k
    sequences, length, width = datastore.arrays["keys"].shape
    queries = sample_queries(datastore, RECALL_POSITIONS)
    timed = read_queries(datastore, 0, min(sequences, -(-TIMED_POSITIONS // length)))
    measured, sample, first = [], None, None
    say(f"search: at most {min(KEYS, sequences * length):,} keys, {len(timed):,} timed positions")
    with tempfile.TemporaryDirectory() as scratch:
        for dimensions in (0, *(width // divisor for divisor in _FEWER_DIMENSIONS)):
            for name in SEARCH_BACKENDS:
                settings = {**config.targets, "search_dimensions": dimensions}
                try:
                    key_shards = _prepare(datastore, name, settings, epath.Path(scratch) / f"{name}_{dimensions}")
                except ConfigError as error:
                    say(f"search: {name} is left out: {error}")
                    continue
                start = time.perf_counter()
                key_shards.open(0)
                built = time.perf_counter() - start
                if sample is None:
                    sample = Sample.draw(key_shards, queries, "self", k)
                of_backend = dataclasses.replace(sample, key_shards=key_shards)
                trial = _least(of_backend, config.targets.recall)
                first = first or trial
                measured.append(_row(name, of_backend, timed, trial, built))
                say(f"{measured[-1]['name']}: {measured[-1]['value']:,.0f} positions/s, {measured[-1]['detail']}")
    try:
        measured.append(_reference_row(sample, timed, first.effort))
    except UserError as error:
        say(f"search: the reference's row is left out: {error}")
    return measured


def _prepare(datastore: Artifact, name: str, settings: dict, scratch: epath.Path) -> KeyShards:
    """The first `KEYS` keys of a training split as a single shard, on one device.

    Raises:
      ConfigError: the backend cannot run here.
    """
    mesh = make_mesh(devices=jax.devices()[:1])
    search = Search.create(backends.chosen(name)[1], settings, mesh)
    scratch.mkdir()
    key_shards = KeyShards.prepare(datastore, KEYS, scratch, search, mesh)
    key_shards.bounds = key_shards.bounds[:2]
    return key_shards


def _least(sample: Sample, recall: float) -> tuning.Trial:
    """The search of least effort that reaches the recall, or comes close to the best that its backend can reach."""
    efforts, _ = sample.key_shards.efforts()
    most, _ = sample.search(efforts[-1] if efforts else None)
    trials, place = tuning.reach(sample.key_shards, sample, min(recall, most - _NEARLY if efforts else most))
    return trials[place]


def _row(name: str, sample: Sample, timed: Queries, trial: tuning.Trial, built: float) -> dict:
    """Measures one backend."""
    key_shards = sample.key_shards
    key_shard = key_shards.open(0)
    seconds, cpu = _timed(lambda queries: key_shard.search(queries, sample.k, "self", trial.effort), timed, sample.k)
    # As if the text consisted of long documents and each position's own document were excluded.
    long_shard = dataclasses.replace(key_shard, documents_N=np.arange(key_shards.rows(0)) // _LONG_DOCUMENT)
    long_queries = dataclasses.replace(timed, documents_Q=timed.positions_Q // _LONG_DOCUMENT)
    _, long_cpu = _timed(
        lambda queries: long_shard.search(queries, sample.k, "document", trial.effort), long_queries, sample.k
    )
    temperature = _TEMPERATURE * float(np.median(sample.true_neighbors[0][0]))
    variance = f", {key_shards.variance_kept:.3f} of the variance" if key_shards.search.dimensions else ""
    return row(
        f"search, {name}, {key_shards.searched_width} of {key_shards.width} dimensions",
        len(timed) / seconds,
        "positions/s",
        f"recall@{sample.k} {trial}{variance}; total variation "
        f"{sample.total_variation(trial.packed_QxK, temperature):.4f}; {key_shards.rows(0):,} keys; "
        f"{1e6 * cpu / len(timed):.0f} us of CPU time per position, {1e6 * long_cpu / len(timed):.0f} without its "
        f"document of {_LONG_DOCUMENT:,} positions; {built:.0f} s to build",
    )


def _reference_row(sample: Sample, timed: Queries, effort: Effort | None) -> dict:
    """FAISS on the same keys, unprojected; drops each query's nearest neighbor, which is the query itself. Its calls
    alternate with the search of the sample's own shard, so that other load affects both equally.

    Raises:
      UserError: FAISS is not installed.
    """
    start = time.perf_counter()
    keys = sample.key_shards.keys(0)
    index, described = reference_index(keys.read(0, keys.size).astype(np.float32))
    built = time.perf_counter() - start
    ids_QxK1 = index.search(sample.queries.keys_QxD, sample.k + 1)[1]
    own_Q = sample.queries.positions_Q
    ids_QxK = np.stack([ids_K1[ids_K1 != own][: sample.k] for ids_K1, own in zip(ids_QxK1, own_Q, strict=True)])
    true_ids_QxK = sample.true_neighbors[0][1]

    cpu = time.process_time()
    index.search(timed.keys_QxD, sample.k + 1)
    cpu = time.process_time() - cpu
    calls = {
        "FAISS": lambda: index.search(timed.keys_QxD, sample.k + 1),
        "first row": lambda: sample.key_shards.search_shard(0, timed, sample.k, "self", effort),
    }
    seconds = seconds_by_round(calls, _ROUNDS)
    ratio = float(np.median(seconds["FAISS"] / seconds["first row"]))
    return row(
        "search, the reference's way",
        len(timed) / float(np.median(seconds["FAISS"])),
        "positions/s",
        f"recall@{sample.k} {contains(ids_QxK.astype(np.int32), true_ids_QxK).mean():.3f} with {described}; "
        f"{keys.size:,} keys; {1e6 * cpu / len(timed):.0f} us of CPU time per position; {built:.0f} s to build, "
        f"{host.cpu_count()} cores; the first row's search has {ratio:.2f} times its rate, "
        f"median of {_ROUNDS} rounds",
    )


def _timed(search: Callable[[Queries], object], queries: Queries, k: int) -> tuple[float, float]:
    """(seconds, CPU seconds of all cores) of a search in chunks, as in the stage, without compilation."""
    search(queries[: ring.QUERIES_PER_DEVICE])
    start, cpu = time.perf_counter(), time.process_time()
    in_chunks(lambda part: search(queries[part]), len(queries), k)
    return time.perf_counter() - start, time.process_time() - cpu
