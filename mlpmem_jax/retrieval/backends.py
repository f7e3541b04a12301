"""The search backend protocol, and the one place where a backend is chosen.

To add a backend, write a module with a class `Backend` that has the methods below, and add a line to
`core.config.SEARCH_BACKENDS`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core.config import SEARCH_BACKENDS
from mlpmem_jax.core.errors import ConfigError
from mlpmem_jax.core.progress import say


@dataclasses.dataclass(frozen=True)
class KeySource:
    """The keys of one shard, read in ranges.

    Attributes:
      size: N.
      width: D.
      dtype: dtype of the keys in the datastore.
      read: function of (start, stop) that returns keys [stop - start, D], float.
    """

    size: int
    width: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Needs:
    """Memory and disk that one shard of keys takes in each process that searches it, in bytes.

    Attributes:
      memory: peak memory while its index is built or searched.
      disk: peak size of its index while it is built or loaded, in the scratch folder, or in the folder for temporary
        files if scratch is remote.
      stored: size of its finished index, which stays in the scratch folder until the stage is finished.
    """

    memory: int
    disk: int = 0
    stored: int = 0


class Effort(Protocol):
    """A search setting of an index: a greater effort finds more of the neighbors and reads more."""

    def summary(self) -> dict[str, float]:
        """JSON values that identify the effort, for manifests and reports."""

    def cost(self, size: int, width: int, k: int) -> int:
        """Bytes that one query for k neighbors reads in an index of `size` keys."""

    def __str__(self) -> str:
        """A description that can follow "a recall of 0.9 with"."""


class Index(Protocol):
    """The searchable keys of one shard; their ids count from 0."""

    def search(
        self,
        queries_QxD: np.ndarray,
        k: int,
        excluded_Qx2: np.ndarray | None = None,
        effort: Effort | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query. Thread-safe, unless the backend is collective.

        Args:
          queries_QxD: float32 [Q, D].
          k: neighbors per query.
          excluded_Qx2: int [Q, 2]; for query q, keys with ids in [start, stop) are excluded. None excludes none.
          effort: one of the backend's efforts; None for the first or only one.

        Returns:
          (squared distances float32 [Q, k], ids int32 [Q, k]), nearest first; missing neighbors have infinite
          distances and the id `neighbors.MISSING`.
        """


class Backend(Protocol):
    """A way to search shards of keys, with its settings.

    Attributes:
      k: neighbors per query of an index.
      is_collective: whether all processes open and search a shard together, in lockstep.
      is_exact: whether no neighbor is ever missed.
      is_rotated: whether it needs keys that are centered and rotated (`reduction`).
      remedies: advice if no effort reaches the required recall.
    """

    k: int
    is_collective: bool
    is_exact: bool
    is_rotated: bool
    remedies: str

    @classmethod
    def unavailable(cls) -> str:
        """Why it cannot be used on this machine, phrased to follow its name; "" if it can."""

    @classmethod
    def create(cls, settings: Mapping, k: int, mesh: Mesh | None = None) -> Backend:
        """Creates the backend from settings named as in config.targets.

        Args:
          settings: config.targets.
          k: neighbors per query of an index.
          mesh: the devices of the run; None for planning without devices.
        """

    def needs(self, rows: int, width: int, key_bytes: int, processes: int) -> Needs:
        """The needs of a process for a shard of `rows` keys of `width` numbers of `key_bytes` bytes, in a job of
        `processes` processes."""

    def flops(self, rows: int, width: int, queries: int) -> float:
        """FLOPs of building an index of one shard and searching it with `queries` queries."""

    def efforts(self, rows: int, width: int) -> tuple[Sequence[Effort], int]:
        """(efforts, cheapest first; the index of the one to try first). Empty if there is only one way to search."""

    def open(self, keys: KeySource, folder: epath.Path) -> Index:
        """Opens the index of a shard, building it if it is not in `folder` yet."""


def chosen(name: str) -> tuple[str, type[Backend]]:
    """The backend that config.targets.backend names; "auto" is the first in the table that this machine can run.

    Returns:
      (its name, its class).

    Raises:
      ConfigError: the named backend cannot run here, or none can.
    """
    for candidate in SEARCH_BACKENDS if name == "auto" else [name]:
        backend = importlib.import_module(SEARCH_BACKENDS[candidate]).Backend
        reason = backend.unavailable()
        if not reason:
            return candidate, backend
        if name == "auto":
            say(f"targets: {candidate} {reason}: trying the next backend")
    raise ConfigError(
        f"config.targets.backend: {name!r} {reason}; install what it needs, or set it to 'auto' or 'exact'"
    )


def planned(name: str) -> type[Backend]:
    """The class of the backend that a fully installed machine would choose, whether or not this one can run it."""
    return importlib.import_module(SEARCH_BACKENDS[next(iter(SEARCH_BACKENDS)) if name == "auto" else name]).Backend
