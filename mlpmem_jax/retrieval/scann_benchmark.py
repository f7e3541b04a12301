"""The cost of ScaNN on this machine, in CPU time and memory.

Costs are measured on clustered keys, and the hours of searches too large for this machine are extrapolated from them.
An index is built and loaded in a separate process (this module run as a program), so that its memory can be measured.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import ml_collections
import numpy as np

from mlpmem_jax.core import host
from mlpmem_jax.core.benchmark_rows import row
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.retrieval import needs, reduction, scann_backend
from mlpmem_jax.retrieval.key_shards import Search
from mlpmem_jax.retrieval.scann_backend import ScannIndex
from mlpmem_jax.retrieval.scann_index import Options, write
from mlpmem_jax.retrieval.targets_benchmark import clustered_keys

KEYS, TRAINED_ON, WIDTHS, NEIGHBORS = 800_000, 100_000, (32, 128), 1024
QUERIES = 1024
_LARGE = (  # (positions, width of a key, keys per shard, searched dimensions)
    (1_000_000, 128, 2_000_000, 0),
    (100_000_000, 1280, 16_000_000, 0),
    (100_000_000, 1280, 16_000_000, 256),
)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Single-core seconds per number of a key.

    Attributes:
      scanned: for keys in the searched leaves, including the search's other costs.
      reordered: for candidates whose distance ScaNN computes exactly.
      whole: for candidates whose distance in all dimensions is computed after searching fewer dimensions.
    """

    scanned: float
    reordered: float
    whole: float


MEASURED = Rates(scanned=42.5e-12, reordered=1.17e-9, whole=1.60e-9)
"""Of a core of a virtual Intel Xeon with AVX-512, at width 128; docs/neighbors.md has the measurement."""


def core_hours(
    search: Search, positions: int, width: int, shard_rows: int, rates: Rates = MEASURED
) -> tuple[float, str]:
    """Core hours for the neighbors of all positions, and a description of what they consist of.

    Args:
      search: a search with ScaNN; its first effort is assumed.
      positions: N, each of them a key and a query.
      width: dimensions of a key.
      shard_rows: maximum keys per index.
      rates: a machine's rates.
    """
    shards = -(-positions // shard_rows)
    rows = positions // shards
    searched, wanted = search.dimensions or width, search.backend.k
    options = search.backend.options(rows)
    reordered = round(options.reorder * wanted)
    scan = options.leaves_to_search * rows / options.leaves * searched * rates.scanned
    reorder = reordered * searched * rates.reordered
    whole = wanted * width * rates.whole if search.dimensions else 0.0
    detail = (
        f"{shards} shards; a query in each: {1e3 * scan:.2f} ms for {options.leaves_to_search} of {options.leaves} "
        f"leaves, {1e3 * reorder:.2f} ms for {reordered} candidates, {1e3 * whole:.2f} ms for whole distances"
    )
    return positions * shards * (scan + reorder + whole) / 3600, detail


def _processor_seconds(work: Callable[[], object]) -> float:
    """CPU seconds of all cores; the minimum of three runs."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _build_and_load(folder: str, size: int, leaves: int) -> dict[str, float]:
    """The seconds and memory (not counting the keys) that a process needs for an index of the first `size` keys."""
    command = [sys.executable, "-m", __name__, folder, str(size), str(leaves)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise UserError(f"benchmark of ScaNN: the process that builds an index exited with code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def _index_rows(width: int) -> tuple[list[dict], Rates]:
    """The cost of building and searching an index, for one width."""
    keys_NxD = clustered_keys(KEYS, width)
    leaves = Options.derive(KEYS, NEIGHBORS).leaves
    backend = scann_backend.Backend(NEIGHBORS, training_sample=TRAINED_ON)
    measured = []
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/keys.npy", keys_NxD)
        trained, built = (_build_and_load(folder, size, leaves) for size in (TRAINED_ON, KEYS))
        for size, cost in ((TRAINED_ON, trained), (KEYS, built)):
            measured.append(
                row(
                    f"ScaNN, {size:,} keys of width {width}: build",
                    cost["seconds"],
                    "s of processor time",
                    f"{leaves} leaves, trained on {TRAINED_ON:,} keys; memory {cost['built'] / 1e9:.3f} GB during "
                    f"the build, {cost['loading'] / 1e9:.3f} GB during loading, {cost['loaded'] / 1e9:.3f} GB loaded; "
                    f"predicted {backend.needs(size, width, 4, 1).memory / 1e9:.3f} GB",
                )
            )
        filled = (built["seconds"] - trained["seconds"]) / (KEYS - TRAINED_ON)
        measured.append(row(f"ScaNN, width {width}: to fill in a key", 1e6 * filled, "us", f"{leaves} leaves"))
        searching, rates = _search_rows(pathlib.Path(folder) / str(KEYS), keys_NxD)
    return measured + searching, rates


def _search_rows(folder: pathlib.Path, keys_NxD: np.ndarray) -> tuple[list[dict], Rates]:
    """The cost of a candidate, from the time that twice as many add to a search, and of a leaf, from the rest."""
    size, width = keys_NxD.shape
    queries_QxD = keys_NxD[size // 2 :][:QUERIES]
    options = Options.derive(size, NEIGHBORS)

    def seconds(**changed) -> float:
        """Seconds per query, with changed options."""
        index = ScannIndex.load(folder, size, dataclasses.replace(options, **changed))
        return _processor_seconds(lambda: index.search(queries_QxD, NEIGHBORS)) / len(queries_QxD)

    query = seconds()
    candidate = (seconds(reorder=2 * options.reorder) - query) / (options.reorder * NEIGHBORS)
    leaf = (query - candidate * options.reorder * NEIGHBORS) / options.leaves_to_search
    ids_QxJ = np.random.default_rng(0).integers(0, size, (QUERIES // 8, NEIGHBORS))
    stored_NxD = keys_NxD.astype(np.float16)
    whole = _processor_seconds(lambda: reduction.squared_distances(queries_QxD[: len(ids_QxJ)], stored_NxD, ids_QxJ))
    whole /= ids_QxJ.size
    rates = Rates(leaf * options.leaves / size / width, candidate / width, whole / width)
    name = f"ScaNN, width {width}"
    return [
        row(
            f"{name}: a query",
            1e6 * query,
            "us",
            f"k {NEIGHBORS}, {options.leaves_to_search} of {options.leaves} leaves, {options.reorder} x k candidates",
        ),
        row(f"{name}: a leaf", 1e6 * leaf, "us", f"{1e12 * rates.scanned:.1f} ps per number of its keys"),
        row(f"{name}: a candidate", 1e6 * candidate, "us", f"{1e9 * rates.reordered:.2f} ns per number"),
        row(f"whole distance, width {width}", 1e6 * whole, "us", f"{1e9 * rates.whole:.2f} ns per number"),
    ], rates


def _large_rows(rates: Rates) -> list[dict]:
    """Extrapolations from the rates to searches too large for this machine."""
    computed = []
    for positions, width, shard_rows, dimensions in _LARGE:
        search = Search.create(scann_backend.Backend, {"k": NEIGHBORS, "search_dimensions": dimensions})
        hours, detail = core_hours(search, positions, width, shard_rows, rates)
        rows_of_shard = positions // -(-positions // shard_rows)
        memory = needs.of_process(search, rows_of_shard, width, 2, needs.Workload(1 << 17, NEIGHBORS, 256)).memory
        where = f"in {dimensions} of {width:,}" if dimensions else f"in {width:,}"
        name = f"computed: {positions:,} positions, k {NEIGHBORS}, {where} dimensions"
        computed.append(row(name, hours, "hours of a core", f"{detail}; {memory / 1e9:.2f} GB of memory"))
    return computed


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Rows of (name, value, unit, detail)."""
    if reason := scann_backend.unavailable():
        say(f"scann: no rows: ScaNN {reason}")
        return []
    measured = []
    for width in WIDTHS:
        of_width, rates = _index_rows(width)
        measured += of_width
    measured += _large_rows(rates)  # with the rates of the widest keys
    return measured


def _resident_bytes() -> int:
    """The resident memory of this process, after returning freed memory to the system; also resets the peak."""
    ctypes.CDLL(None).malloc_trim(0)
    host.reset_peak()
    return host.peak_rss_bytes()


def _main(folder: str, size: int, leaves: int) -> None:
    keys_NxD = np.array(np.load(f"{folder}/keys.npy", mmap_mode="r")[:size])
    options = Options.derive(size, NEIGHBORS, leaves=leaves, training_sample=TRAINED_ON)
    index_folder = pathlib.Path(folder) / str(size)
    index_folder.mkdir(exist_ok=True)
    before, start = _resident_bytes(), time.process_time()
    write(index_folder, *keys_NxD.shape, lambda start, stop: keys_NxD[start:stop], options)
    cost = {"seconds": time.process_time() - start}
    cost["built"] = host.peak_rss_bytes() - before - keys_NxD.nbytes  # the keys in the index are mapped from its file
    before = _resident_bytes()
    index = ScannIndex.load(index_folder, size, options)
    cost["loading"] = host.peak_rss_bytes() - before
    cost["loaded"] = _resident_bytes() - before
    del index
    print(json.dumps(cost))


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
