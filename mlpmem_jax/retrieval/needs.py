"""Memory and disk that stage `targets` needs on a host, checked at the start of a run and of the stage."""

from __future__ import annotations

import dataclasses
import socket
import tempfile
import zlib

import jax
import ml_collections
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from mlpmem_jax.core import host
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.errors import ConfigError, UserError
from mlpmem_jax.core.manifests import located, read_manifest
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.storage import is_remote, temporary_room
from mlpmem_jax.corpus.documents import SPLITS
from mlpmem_jax.corpus.tokens import TokenStream, num_sequences
from mlpmem_jax.interop import published
from mlpmem_jax.retrieval import backends, chunks, tiles
from mlpmem_jax.retrieval.key_shards import Search, shard_count

_RUNTIME_BYTES = 512 << 20  # Python, JAX, ScaNN and compiled programs
_PROJECTION_BYTES = 40  # bytes per pair of dimensions, while the rotation is generated
_CHUNK_BYTES = 48  # bytes per neighbor that a thread is converting to a distribution
_ENTRY_BYTES = 24  # bytes per entry of a distribution until its shard is written


@dataclasses.dataclass(frozen=True)
class Workload:
    """The positions for which a process looks up neighbors.

    Attributes:
      positions: positions per shard of the datastore.
      k: neighbors per position.
      entries: maximum entries of a distribution.
    """

    positions: int
    k: int
    entries: int


@dataclasses.dataclass(frozen=True)
class ProcessNeeds:
    """Upper bounds on a process's needs, in bytes.

    Attributes:
      fixed: memory that does not depend on the number of keys.
      shard: memory for the keys of a shard and their index.
      disk: disk space, see `backends.Needs`.
    """

    fixed: int
    shard: int
    disk: int

    @property
    def memory(self) -> int:
        return self.fixed + self.shard


def of_process(
    search: Search,
    rows: int,
    width: int,
    key_bytes: int,
    load: Workload,
    processes: int = 1,
    cpus: int | None = None,
) -> ProcessNeeds:
    """Upper bounds on a process's needs; docs/neighbors.md has measurements.

    Args:
      search: how shards are searched.
      rows: keys per shard.
      width: dimensions of a key.
      key_bytes: bytes per number in the datastore.
      load: the queries.
      processes: number of processes of the job.
      cpus: number of CPUs of the process; None for those of this one.
    """
    index = search.needs(rows, width, key_bytes, processes)
    whole = rows * width * key_bytes if search.dimensions else 0
    queries = load.positions * (width * (key_bytes + 4) + _ENTRY_BYTES * load.entries)
    in_work = _CHUNK_BYTES * chunks.NEIGHBORS_PER_CHUNK * (cpus or host.cpu_count())
    projection = _PROJECTION_BYTES * width**2 if search.is_projected else 0
    return ProcessNeeds(_RUNTIME_BYTES + projection + queries + in_work, index.memory + whole, index.disk)


@dataclasses.dataclass(frozen=True)
class ScratchNeeds:
    """What the scratch folder contains, in bytes; all of it is deleted when the stage is finished.

    Attributes:
      indices: the indices of all shards of keys, kept to the end.
      neighbors: the nearest neighbors so far of every position, at most; while the last shard of keys is searched they
        are replaced by targets.
    """

    indices: int
    neighbors: int


def of_scratch(
    search: Search, sequences: int, length: int, queries: int, rows: int, width: int, key_bytes: int, k: int
) -> ScratchNeeds:
    """The largest size of the scratch folder.

    Args:
      search: how shards are searched.
      sequences, length: dimensions of the training split, whose positions are the keys.
      queries: positions of all splits.
      rows: maximum keys per shard.
      width, key_bytes: as in `of_process`.
      k: neighbors per position.
    """
    shards = shard_count(sequences, length, rows)
    index = search.needs(-(-sequences * length // shards), width, key_bytes, 1)
    return ScratchNeeds(shards * index.stored, tiles.NEIGHBOR_BYTES * queries * k if shards > 1 else 0)


def check(needs: ProcessNeeds, rows: int, scratch: epath.Path) -> None:
    """Checks that this host has what its processes need together.

    Args:
      needs: the needs of each process.
      rows: keys per shard.
      scratch: the folder for indices.

    Raises:
      ConfigError: there is too little memory, or too little space for temporary files.
    """
    processes, memory = processes_of_host(), host.memory_bytes()
    where = "in a process" if processes == 1 else f"in each of {processes} processes of this host"
    say(f"targets: shards of up to {rows:,} keys take at most {_gib(needs.memory)} of memory {where}")
    if processes * needs.memory > memory:
        fitting = int(rows * (memory / processes - needs.fixed) / needs.shard)
        remedy = "use a machine with more"
        if fitting > 0:
            remedy = f"lower it to {fitting:,} or less, or set config.targets.search_dimensions"
        raise ConfigError(
            f"config.targets.key_shard_rows: a shard of {rows:,} keys takes {_gib(needs.memory)} of memory {where}, "
            f"but this machine has {_gib(memory)}; {remedy}"
        )
    if needs.disk and is_remote(scratch):
        folder, free = tempfile.gettempdir(), temporary_room()
        if processes * needs.disk > free:
            raise ConfigError(
                f"config.targets.key_shard_rows: {scratch} is not a local folder, so the index of a shard of {rows:,} "
                f"keys takes {_gib(needs.disk)} of temporary files {where}, {folder} has {_gib(free)} free; lower "
                f"it to {int(rows * free / (processes * needs.disk)):,} or less, set config.targets.search_dimensions, "
                "or name a larger disk in the environment variable TMPDIR"
            )


def check_run(config: ml_collections.ConfigDict) -> bool:
    """Checks the needs of stage `targets` before base and datastore are paid for; all processes must call it together.

    Returns:
      Whether that was possible: False if there are no finished tokens, or the width of the keys is not known yet.

    Raises:
      ConfigError: as `check`, or no backend can run here.
    """
    settings, length, workdir = config.targets, config.base.context_length, epath.Path(config.workdir)
    if all(_summary(workdir / "targets" / split) for split in SPLITS):
        return True
    if not _summary(workdir / "tokens") or (width := _key_width(config)) is None:
        return False
    stream = TokenStream(open_artifact(workdir / "tokens", "tokens"), "train")
    rows = min(settings.key_shard_rows, num_sequences(stream, length) * length)
    search = Search.create(backends.chosen(settings.backend)[1], settings)
    load = Workload(
        config.datastore.sequences_per_shard * length, settings.k, min(settings.k, settings.keep or settings.k)
    )
    key_bytes = np.dtype(config.datastore.dtype).itemsize
    check(of_process(search, rows, width, key_bytes, load, jax.process_count()), rows, workdir / "targets")
    return True


def _key_width(config: ml_collections.ConfigDict) -> int | None:
    """The width of the model that makes the keys: a finished one's, or a published one's; None if unknown."""
    model = config.datastore.key_model or (config.base.path if config.base.source != "train" else "")
    if not model:
        return config.base.width
    if summary := _summary(epath.Path(config.workdir) / ("key_model" if config.datastore.key_model else "base")):
        return summary["model"]["width"]
    try:
        return published.dimensions(model).width
    except UserError:  # if the model is not there, its import will say so
        return None


def _summary(path: epath.Path) -> dict:
    """The summary of a finished artifact; empty if it is not there."""
    manifest = read_manifest(located(path))
    return manifest["summary"] if manifest is not None and manifest["sealed"] else {}


def _gib(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB"


def processes_of_host() -> int:
    """The number of the job's processes on this host; a collective call."""
    if jax.process_count() == 1:
        return 1
    own = zlib.crc32(socket.gethostname().encode())
    return int((multihost_utils.process_allgather(np.uint32(own)) == own).sum())
