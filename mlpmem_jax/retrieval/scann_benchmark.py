"""What ScaNN costs on this machine, in processor time and memory.

Costs are measured on clustered keys, and the hours of searches too large for a desk are computed from them. An index is
built and loaded by a process of its own: this module run as a program, which then knows what its memory went into.
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
_LARGE = (  # (positions, width of a key, keys of a shard, dimensions that are searched)
    (1_000_000, 128, 2_000_000, 0),
    (100_000_000, 1280, 16_000_000, 0),
    (100_000_000, 1280, 16_000_000, 256),
)


@dataclasses.dataclass(frozen=True)
class Rates:
    """Seconds of one core for each number of a key.

    Attributes:
      scanned: of the keys in the leaves that are searched; the search's other costs are spread over them.
      reordered: of the candidates whose distance ScaNN computes exactly.
      whole: of the candidates whose distance in all dimensions is computed where fewer are searched.
    """

    scanned: float
    reordered: float
    whole: float


def core_hours(positions: int, width: int, shard_rows: int, dimensions: int, rates: Rates) -> tuple[float, str]:
    """Hours of one core that the neighbors of all positions take, and what they consist of, in words.

    Args:
      positions: N, each of them a key and a query.
      width: numbers in a key.
      shard_rows: most keys in an index.
      dimensions: principal components that are searched; 0 for all.
      rates: of the machine.
    """
    shards = -(-positions // shard_rows)
    rows = positions // shards
    searched = dimensions or width
    wanted = reduction.candidates(NEIGHBORS) if dimensions else NEIGHBORS
    options = Options.derive(rows, wanted)
    reordered = round(options.reorder * wanted)
    scan = options.leaves_to_search * rows / options.leaves * searched * rates.scanned
    reorder = reordered * searched * rates.reordered
    whole = wanted * width * rates.whole if dimensions else 0.0
    detail = (
        f"{shards} shards; a query in each: {1e3 * scan:.2f} ms for {options.leaves_to_search} of {options.leaves} "
        f"leaves, {1e3 * reorder:.2f} ms for {reordered} candidates, {1e3 * whole:.2f} ms for whole distances"
    )
    return positions * shards * (scan + reorder + whole) / 3600, detail


def _processor_seconds(work: Callable[[], object]) -> float:
    """Of all cores; the least of three times."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


def _build_and_load(folder: str, size: int, leaves: int) -> dict[str, float]:
    """What an index of the first `size` of FOLDER/keys.npy costs a process: seconds, and bytes beside those keys."""
    command = [sys.executable, "-m", __name__, folder, str(size), str(leaves)]
    child = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if child.returncode:
        raise UserError(f"benchmark of ScaNN: the process that builds an index ended with exit code {child.returncode}")
    return json.loads(child.stdout.splitlines()[-1])


def _index_rows(width: int) -> tuple[list[dict], Rates]:
    """Costs of building an index and of searching it, at one width."""
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
                    f"{leaves} leaves, trained on {TRAINED_ON:,} keys; memory {cost['built'] / 1e9:.3f} GB while it is "
                    f"built, {cost['loading'] / 1e9:.3f} GB while it is loaded, {cost['loaded'] / 1e9:.3f} GB then; "
                    f"stated {backend.needs(size, width, 4, 1).memory / 1e9:.3f} GB",
                )
            )
        filled = (built["seconds"] - trained["seconds"]) / (KEYS - TRAINED_ON)
        measured.append(row(f"ScaNN, width {width}: to fill in a key", 1e6 * filled, "us", f"{leaves} leaves"))
        searching, rates = _search_rows(pathlib.Path(folder) / str(KEYS), keys_NxD)
    return measured + searching, rates


def _search_rows(folder: pathlib.Path, keys_NxD: np.ndarray) -> tuple[list[dict], Rates]:
    """Costs of a candidate, from what twice as many add to the time of a search, and of a leaf, from all the rest."""
    size, width = keys_NxD.shape
    queries_QxD = keys_NxD[size // 2 :][:QUERIES]
    options = Options.derive(size, NEIGHBORS)

    def seconds(**changed) -> float:
        """Of one query, with other options."""
        index = ScannIndex.load(folder, size, dataclasses.replace(options, **changed))
        return _processor_seconds(lambda: index.search(queries_QxD, NEIGHBORS)) / len(queries_QxD)

    query = seconds()
    candidate = (seconds(reorder=2 * options.reorder) - query) / (options.reorder * NEIGHBORS)
    leaf = (query - candidate * options.reorder * NEIGHBORS) / options.leaves_to_search
    ids_QxC = np.random.default_rng(0).integers(0, size, (QUERIES // 8, NEIGHBORS))
    stored_NxD = keys_NxD.astype(np.float16)
    whole = _processor_seconds(lambda: reduction.squared_distances(queries_QxD[: len(ids_QxC)], stored_NxD, ids_QxC))
    whole /= ids_QxC.size
    rates = Rates(leaf * options.leaves / size / width, candidate / width, whole / width)
    name = f"ScaNN, width {width}"
    return [
        row(
            f"{name}: a query",
            1e6 * query,
            "us",
            f"k {NEIGHBORS}, {options.leaves_to_search} of {options.leaves} leaves, {options.reorder} x k candidates",
        ),
        row(f"{name}: a leaf", 1e6 * leaf, "us", f"{1e12 * rates.scanned:.1f} ps for each number of its keys"),
        row(f"{name}: a candidate", 1e6 * candidate, "us", f"{1e9 * rates.reordered:.2f} ns for each of its numbers"),
        row(f"whole distance, width {width}", 1e6 * whole, "us", f"{1e9 * rates.whole:.2f} ns for each of its numbers"),
    ], rates


def _large_rows(rates: Rates) -> list[dict]:
    """What no desk can measure, computed from the rates."""
    computed = []
    for positions, width, shard_rows, dimensions in _LARGE:
        hours, detail = core_hours(positions, width, shard_rows, dimensions, rates)
        rows_of_shard = positions // -(-positions // shard_rows)
        search = Search.create(scann_backend.Backend, {"k": NEIGHBORS, "search_dimensions": dimensions})
        memory = needs.of_process(search, rows_of_shard, width, 2, needs.Workload(1 << 17, NEIGHBORS, 256)).memory
        where = f"in {dimensions} of {width:,}" if dimensions else f"in {width:,}"
        name = f"computed: {positions:,} positions, k {NEIGHBORS}, {where} dimensions"
        computed.append(row(name, hours, "hours of a core", f"{detail}; {memory / 1e9:.2f} GB of memory"))
    return computed


def rows(config: ml_collections.ConfigDict) -> list[dict]:
    """Measures; each row has name, value, unit and detail."""
    if reason := scann_backend.unavailable():
        say(f"scann: no rows, ScaNN {reason}")
        return []
    measured = []
    for width in WIDTHS:
        of_width, rates = _index_rows(width)
        measured += of_width
    measured += _large_rows(rates)  # those of the widest keys
    return measured


def _resident_bytes() -> int:
    """Of this process, now. What its allocator only keeps goes back before, and the peak starts anew from here."""
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
