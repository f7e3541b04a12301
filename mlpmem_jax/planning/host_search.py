"""The neighbor search where it runs on the hosts' CPUs: its hours, and those of the chips that are held meanwhile."""

from __future__ import annotations

import dataclasses

import ml_collections

from mlpmem_jax.core.accelerators import Slice
from mlpmem_jax.planning import programs
from mlpmem_jax.retrieval import backends, scann_backend, scann_benchmark
from mlpmem_jax.retrieval.key_shards import Search

ON_CHIPS = "--config.targets.backend=exact --config.targets.recall_target=0.95 --config.datastore.dtype=bfloat16"
"""Overrides that search on the chips instead."""


@dataclasses.dataclass(frozen=True)
class HostSearch:
    """A search with ScaNN for the positions of the training split, without building the indices.

    Attributes:
      core_hours: hours of a core, from `scann_benchmark.MEASURED`.
      detail: what they consist of.
      hosts, cpus: number of hosts, and of virtual CPUs of each.
      chips: chips of all hosts, which wait.
    """

    core_hours: float
    detail: str
    hosts: int
    cpus: int
    chips: int

    @property
    def hours(self) -> float:
        """Hours with all CPUs of all hosts at work."""
        return self.core_hours / (self.hosts * self.cpus)

    @property
    def chip_hours(self) -> float:
        """Chip-hours that are held meanwhile."""
        return self.hours * self.chips

    def __str__(self) -> str:
        return (
            f"Neighbors: config.targets.backend is ScaNN, on the hosts' CPUs: {self.core_hours:,.0f} core-hours "
            f"without building the indices ({self.detail}), at the rates of a core of a virtual AMD EPYC, "
            "docs/neighbors.md. "
            f"{self.hosts} x {self.cpus} virtual CPUs take {self.hours:,.1f} hours, which hold {self.chips} chips for "
            f"{self.chip_hours:,.1f} chip-hours. To search on the chips: {ON_CHIPS}"
        )


def plan(config: ml_collections.ConfigDict, positions: int, tpu: Slice, slices: int) -> HostSearch | None:
    """The search on the hosts of some slices; None if the config does not search with ScaNN.

    Args:
      config: the whole config.
      positions: positions of the training split.
      tpu, slices: the slices.

    Raises:
      UserError: the dimensions of the model of the keys are unknown.
    """
    settings = config.targets
    if backends.planned(settings.backend) is not scann_backend.Backend:
        return None
    width = programs.models_of(config, 1).keys.width
    search = Search.create(scann_backend.Backend, settings)
    hours, detail = scann_benchmark.core_hours(search, positions, width, settings.key_shard_rows)
    return HostSearch(hours, detail, tpu.hosts * slices, tpu.cpus_per_host, tpu.chips * slices)
