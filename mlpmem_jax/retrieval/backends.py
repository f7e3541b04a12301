"""What a search backend is, and the one place where it is chosen.

A new backend is one module with a class `Backend` that has the methods below, and one line in
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
    """The keys of one shard, read a range at a time.

    Attributes:
      size: N.
      width: D.
      dtype: that the datastore keeps them in.
      read: function of (start, stop) that gives keys [stop - start, D], float.
    """

    size: int
    width: int
    dtype: np.dtype
    read: Callable[[int, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one shard of keys takes in each process that searches it, in bytes.

    Attributes:
      memory: at the highest, while its index is built or searched.
      disk: of its index, in the scratch folder, or in the folder for temporary files where that is remote.
    """

    memory: int
    disk: int = 0


class Effort(Protocol):
    """One way to search an index: a greater effort finds more of the neighbors and reads more."""

    def summary(self) -> dict[str, float]:
        """JSON values that tell it from other efforts, for manifests and reports."""

    def cost(self, size: int, width: int, k: int) -> int:
        """Bytes that one query reads in an index of `size` keys for k neighbors."""

    def __str__(self) -> str:
        """In words, to follow "a recall of 0.9 with"."""


class Index(Protocol):
    """The searchable keys of one shard; their ids count from 0."""

    def search(
        self,
        queries_QxD: np.ndarray,
        k: int,
        excluded_Qx2: np.ndarray | None = None,
        effort: Effort | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The k nearest keys of each query. Threads may call it at once, unless the backend is collective.

        Args:
          queries_QxD: float32 [Q, D].
          k: neighbors wanted.
          excluded_Qx2: int [Q, 2]; of query q, keys with ids in [start, stop) are left out. None leaves none out.
          effort: one of the backend's; None for the first, or for the only one.

        Returns:
          (squared distances float32 [Q, k], ids int32 [Q, k]), nearest first; where there are fewer, infinite
          distances and ids of `neighbors.MISSING`.
        """


class Backend(Protocol):
    """A way to search shards of keys, with its settings.

    Attributes:
      k: neighbors that an index is asked for.
      is_collective: whether all processes open and search a shard together, in step.
      is_exact: whether no neighbor is ever missed.
      is_rotated: whether it wants keys that are centered and rotated (`reduction`).
      remedies: what may help where no effort reaches the recall that is asked for.
    """

    k: int
    is_collective: bool
    is_exact: bool
    is_rotated: bool
    remedies: str

    @classmethod
    def unavailable(cls) -> str:
        """Why it cannot be used on this machine, to follow its name; "" where it can."""

    @classmethod
    def create(cls, settings: Mapping, k: int, mesh: Mesh | None = None) -> Backend:
        """The backend as the settings named like those of config.targets want it.

        Args:
          settings: of config.targets.
          k: neighbors that an index will be asked for.
          mesh: the devices of the run; None to plan without any.
        """

    def needs(self, rows: int, width: int, key_bytes: int, processes: int) -> Needs:
        """What a process needs for a shard of `rows` keys of `width` numbers of `key_bytes` bytes, in a job of so many
        processes."""

    def flops(self, rows: int, width: int, queries: int) -> float:
        """FLOPs of building an index of one shard and of searching it for so many queries."""

    def efforts(self, rows: int, width: int) -> tuple[Sequence[Effort], int]:
        """(ways to search, the cheapest first; the place of the one to try first). Empty where there is only one."""

    def open(self, keys: KeySource, folder: epath.Path) -> Index:
        """The index of a shard, built if `folder` does not hold it yet."""


def chosen(name: str) -> tuple[str, type[Backend]]:
    """The backend that config.targets.backend names: "auto" is the first of the table that this machine can run.

    Returns:
      (its name, its class).

    Raises:
      ConfigError: the one that is named cannot run here, or none can.
    """
    for candidate in SEARCH_BACKENDS if name == "auto" else [name]:
        backend = importlib.import_module(SEARCH_BACKENDS[candidate]).Backend
        reason = backend.unavailable()
        if not reason:
            return candidate, backend
        if name == "auto":
            say(f"targets: {candidate} {reason}: taking the next backend")
    raise ConfigError(
        f"config.targets.backend: {name!r} {reason}; install what it needs, or set it to 'auto' or 'exact'"
    )


def planned(name: str) -> type[Backend]:
    """The class of the backend that machines prepared for the run will choose, whatever this one can run."""
    return importlib.import_module(SEARCH_BACKENDS[next(iter(SEARCH_BACKENDS)) if name == "auto" else name]).Backend
