"""Cloud TPU slices by name: "v5litepod-256" or "v5e:16x16" -> chips, hosts, topology, GKE selectors, machine type.

Sources, all Google Cloud documentation:
  cloud.google.com/tpu/docs/v4, /v5e, /v5p, /v6e: slice shapes, hosts, machine types
  cloud.google.com/tpu/docs/types-topologies: shapes of whole cubes, AxBxC with A <= B <= C, all multiples of 4
  cloud.google.com/tpu/docs/runtimes: software versions of TPU VMs
  cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus: node labels
  gcloud compute machine-types list: virtual CPUs
"""

from __future__ import annotations

import dataclasses
import difflib
import itertools
import math
import re
from collections.abc import Mapping

from mlpmem_jax.core.errors import UserError

Topology = tuple[int, ...]
"""Chips along each axis of the interconnect."""


@dataclasses.dataclass(frozen=True)
class Generation:
    """Properties shared by all slices of a TPU generation."""

    prefix: str  # of accelerator types
    cores_per_chip: int  # TensorCores; the number in an accelerator type counts these
    shapes: tuple[Topology, ...]  # all shapes, or if max_chips is set those below one cube
    max_chips: int | None  # size of the largest slice of whole cubes; None = no cubes
    machine_types: Mapping[int, str]  # chips of one host -> machine type
    cpus: Mapping[int, int]  # chips of one host -> its virtual CPUs
    gke_accelerator: str  # value of the node label cloud.google.com/gke-tpu-accelerator
    runtime_version: str  # software of a TPU VM


_SQUARES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_BELOW_ONE_CUBE = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))

GENERATIONS = {
    "v4": Generation(
        prefix="v4",
        cores_per_chip=2,
        shapes=_BELOW_ONE_CUBE,
        max_chips=4096,
        machine_types={4: "ct4p-hightpu-4t"},
        cpus={4: 240},
        gke_accelerator="tpu-v4-podslice",
        runtime_version="tpu-ubuntu2204-base",
    ),
    "v5e": Generation(
        prefix="v5litepod",
        cores_per_chip=1,
        shapes=_SQUARES,
        max_chips=None,
        machine_types={1: "ct5lp-hightpu-1t", 4: "ct5lp-hightpu-4t", 8: "ct5lp-hightpu-8t"},
        cpus={1: 24, 4: 112, 8: 224},
        gke_accelerator="tpu-v5-lite-podslice",
        runtime_version="v2-alpha-tpuv5-lite",
    ),
    "v5p": Generation(
        prefix="v5p",
        cores_per_chip=2,
        shapes=_BELOW_ONE_CUBE,
        max_chips=6144,
        machine_types={4: "ct5p-hightpu-4t"},
        cpus={4: 208},
        gke_accelerator="tpu-v5p-slice",
        runtime_version="v2-alpha-tpuv5",
    ),
    "v6e": Generation(
        prefix="v6e",
        cores_per_chip=1,
        shapes=_SQUARES,
        max_chips=None,
        machine_types={1: "ct6e-standard-1t", 4: "ct6e-standard-4t", 8: "ct6e-standard-8t"},
        cpus={1: 44, 4: 180, 8: 360},
        gke_accelerator="tpu-v6e-slice",
        runtime_version="v2-alpha-tpuv6e",
    ),
}


@dataclasses.dataclass(frozen=True)
class Slice:
    """Chips joined by one interconnect. One chip is one JAX device."""

    generation: Generation
    shape: Topology

    @property
    def family(self) -> str:
        """Key of `GENERATIONS`."""
        return next(family for family, generation in GENERATIONS.items() if generation is self.generation)

    @property
    def topology(self) -> str:
        return "x".join(map(str, self.shape))

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def chips_per_host(self) -> int:
        """A slice that fits on one machine uses one; larger slices use machines with four chips."""
        return self.chips if self.chips in self.generation.machine_types else 4

    @property
    def hosts(self) -> int:
        return self.chips // self.chips_per_host

    @property
    def machine_type(self) -> str:
        return self.generation.machine_types[self.chips_per_host]

    @property
    def cpus_per_host(self) -> int:
        """Virtual CPUs."""
        return self.generation.cpus[self.chips_per_host]

    @property
    def accelerator_type(self) -> str:
        return f"{self.generation.prefix}-{self.chips * self.generation.cores_per_chip}"

    @property
    def has_default_topology(self) -> bool:
        """Whether the accelerator type selects this shape, rather than another one with as many chips."""
        return self == _most_cubic([other for other in slices(self.generation) if other.chips == self.chips])

    def __str__(self) -> str:
        chips, hosts = (f"{n} {noun}{'s' * (n > 1)}" for n, noun in ((self.chips, "chip"), (self.hosts, "host")))
        return f"{self.accelerator_type} ({self.topology}: {chips}, {hosts})"


def _most_cubic(candidates: list[Slice]) -> Slice:
    return min(candidates, key=lambda tpu: sum(tpu.shape))


def slices(generation: Generation) -> list[Slice]:
    """Every slice of a generation, by number of chips."""
    shapes = list(generation.shapes)
    if generation.max_chips is not None:
        cubes = generation.max_chips // 64
        sides = itertools.combinations_with_replacement(range(1, cubes + 1), 2)
        shapes += [(4 * a, 4 * b, 4 * c) for a, b in sides for c in range(b, cubes // (a * b) + 1)]
    return sorted((Slice(generation, shape) for shape in shapes), key=lambda tpu: (tpu.chips, sum(tpu.shape)))


def resolve(name: str, option: str = "--accelerator") -> Slice:
    """The slice for an accelerator type ("v5p-256", "v5litepod-256") or a generation and topology ("v5p:4x4x8").

    Errors name `option`, the command-line option.

    Raises:
      UserError: there is no such slice; names the nearest existing ones.
    """
    match = re.fullmatch(r"([a-z0-9]+)(?:-(\d+)|:(\d+(?:x\d+)+))", name)
    family = match and ("v5e" if match[1] == "v5litepod" else match[1])
    if family not in GENERATIONS:
        raise _unknown(name, option)
    generation = GENERATIONS[family]
    possible = slices(generation)
    if match[3]:
        shape = tuple(map(int, match[3].split("x")))
        matching = [tpu for tpu in possible if tpu.shape == shape]
        chips = math.prod(shape)
    else:
        chips = int(match[2]) / generation.cores_per_chip
        matching = [tpu for tpu in possible if tpu.chips == chips]
    if not matching:
        raise _impossible(name, option, generation, chips)
    return _most_cubic(matching)


def _unknown(name: str, option: str) -> UserError:
    names = [alias for family in GENERATIONS for alias in _names(family)]
    near = difflib.get_close_matches(name, names, n=2) if name.startswith("v") else []
    hint = f"the nearest names are {' and '.join(near)}" if near else "GPUs are launched by launch.slurm"
    return UserError(
        f"{option}={name}: unknown; expected v4-N, v5litepod-N (or v5e-N), v5p-N or v6e-N, or a topology such as "
        f"v5e:16x16; {hint}"
    )


def _names(family: str) -> list[str]:
    ends = [tpu.accelerator_type.rpartition("-")[2] for tpu in slices(GENERATIONS[family])]
    return [f"{prefix}-{end}" for prefix in {family, GENERATIONS[family].prefix} for end in dict.fromkeys(ends)]


def _impossible(name: str, option: str, generation: Generation, chips: float) -> UserError:
    possible = slices(generation)
    below = max((tpu.chips for tpu in possible if tpu.chips <= chips), default=None)
    above = min((tpu.chips for tpu in possible if tpu.chips >= chips), default=None)
    near = [_most_cubic([tpu for tpu in possible if tpu.chips == size]) for size in (below, above) if size is not None]
    counted = "TensorCores, two per chip" if generation.cores_per_chip == 2 else "chips"
    return UserError(
        f"{option}={name}: no such slice (the number in {generation.prefix}-N counts {counted}); the nearest: "
        + ", ".join(dict.fromkeys(map(str, near)))
    )
