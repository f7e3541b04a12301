"""Least time of a compiled program on a slice: every operation at the peak rates of the chip and of its wires.

A prediction from published peaks. Operations run one after the other, each as fast as its matrix products or its
memory traffic allow; collectives that the compiler runs beside them cost what exceeds them, the others wait. What a
peak does not tell (small shapes, sparse look-ups, latencies of small collectives) is not in it.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from mlpmem_jax.planning.chips import Chip
from mlpmem_jax.planning.hlo import Collective, Program


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a device is: its slice, and its chip's coordinates in the torus of the slice."""

    slice: int
    coordinates: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes: bytes that one device sends, seconds, how often."""

    kind: str
    axes: tuple[str, ...]
    network: bool
    overlapped: bool
    bytes: float
    seconds: float
    times: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one call of a program on one device.

    Attributes:
      compute: matrix products alone, recomputation included, at the peak rate.
      memory: traffic of main memory alone.
      operations: one after the other, each the longer of both.
      traffic: the collectives, by kind and mesh axes.
    """

    compute: float
    memory: float
    operations: float
    traffic: tuple[Traffic, ...]

    def collectives(self, *, network: bool, overlapped: bool) -> float:
        """Seconds of the collectives within a slice or between slices, of those beside other work or of the rest."""
        chosen = (one for one in self.traffic if (one.network, one.overlapped) == (network, overlapped))
        return sum(one.seconds for one in chosen)

    @property
    def step(self) -> float:
        """The longest of what runs side by side, and then what nothing runs beside."""
        beside = [self.collectives(network=network, overlapped=True) for network in (False, True)]
        waiting = [self.collectives(network=network, overlapped=False) for network in (False, True)]
        return max(self.operations, self.memory, *beside) + sum(waiting)

    @property
    def bound(self) -> str:
        """What takes most of the time: "compute", "memory", "interconnect" or "network"."""
        seconds = {"compute": self.compute, "memory": self.memory}
        for name, network in (("interconnect", False), ("network", True)):
            seconds[name] = sum(one.seconds for one in self.traffic if one.network == network)
        return max(seconds, key=seconds.get)


def roofline(
    program: Program, chip: Chip, places: Sequence[Place], shape: tuple[int, ...], mesh_shape: dict[str, int]
) -> Roofline:
    """The roofline of a program.

    Args:
      program: of one device; its groups count devices in the order of `places`.
      chip: rates.
      places: of the devices of the mesh, in the mesh's order.
      shape: of the torus of one slice.
      mesh_shape: mesh axis -> size, in order.
    """
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in program.collectives:
        group = [places[number] for number in one.group]
        slices = len({place.slice for place in group})
        key = one.kind, axes(one, mesh_shape), slices > 1, one.overlapped
        total = sums[key]
        if slices > 1:
            # Each slice first reduces (or last gathers) within itself, so that its devices share the network.
            sent = one.sent * slices / len(group) if one.kind != "collective-permute" else one.sent
            seconds = sent / chip.network_bandwidth
        else:
            sent = one.sent
            open_links = links([place.coordinates for place in group], shape, chip.ring_length)
            if one.rings is not None:
                open_links = min(open_links, 2.0 * one.rings)
            seconds = sent / (chip.link_bandwidth * (1 if one.kind == "collective-permute" else open_links))
        for index, value in enumerate((sent, seconds, 1.0)):
            total[index] += value * one.times
    operations = sum(
        one.times * max(one.flops / chip.flops, one.traffic / chip.hbm_bandwidth)
        for one in program.operations
        if not one.asynchronous
    )
    return Roofline(
        compute=program.flops / chip.flops,
        memory=program.traffic / chip.hbm_bandwidth,
        operations=operations,
        traffic=tuple(Traffic(*key, *total) for key, total in sorted(sums.items(), key=lambda item: -item[1][1])),
    )


def axes(collective: Collective, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a collective's group differ."""
    positions = np.stack(np.unravel_index(list(collective.group), tuple(mesh_shape.values())))
    return tuple(name for name, row in zip(mesh_shape, positions, strict=True) if len(set(row.tolist())) > 1)


def links(coordinates: Sequence[tuple[int, ...]], shape: tuple[int, ...], ring_length: int) -> float:
    """Links on which each of a group of chips can send at once, as the chip with the fewest.

    Along each axis of the torus on which the group's chips differ: two where they close a ring, one on a line; of chips
    that are not neighbors, the links in between are shared with the groups of those in between.
    """
    total = 0.0
    for values, size in zip(zip(*coordinates, strict=True), shape, strict=False):
        distinct = sorted(set(values))
        if len(distinct) == 1:
            continue
        stride = (distinct[-1] - distinct[0]) // (len(distinct) - 1)
        closed = size % ring_length == 0 and stride * len(distinct) == size
        total += (2 if closed else 1) / stride
    return max(total, 1.0)
