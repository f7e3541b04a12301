"""The minimum time of a compiled program on a slice, at peak rates of the chip and its interconnect.

This is a prediction from published peaks. Operations run one after the other, each as fast as its matrix products or
its memory traffic allow. A collective costs the part of its time that the operations between its start and its end, in
the compiler's order, do not cover. Effects below peak rates (small shapes, sparse lookups, latencies of small
collectives) are not included.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mlpmem_jax.core.chips import Chip
from mlpmem_jax.planning.hlo import Collective, Program, Step


@dataclasses.dataclass(frozen=True)
class Place:
    """The location of a device: its slice, and its chip's coordinates in the slice's torus."""

    slice: int
    coordinates: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All collectives of one kind over the same mesh axes: bytes that one device sends, their total seconds, how many
    of those seconds are exposed, how often they run."""

    kind: str
    axes: tuple[str, ...]
    network: bool
    bytes: float
    seconds: float
    exposed: float
    times: float


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one call of a program on one device.

    Attributes:
      compute: matrix products only, including recomputation, at the peak rate.
      memory: traffic of main memory only.
      operations: sum over operations of the larger of the two.
      traffic: the collectives, by kind and mesh axes.
    """

    compute: float
    memory: float
    operations: float
    traffic: tuple[Traffic, ...]

    @property
    def exposed(self) -> float:
        """Seconds of exposed collectives."""
        return sum(kind.exposed for kind in self.traffic)

    @property
    def step(self) -> float:
        """Operations plus exposed collectives, or the memory traffic if that takes longer."""
        return max(self.operations, self.memory) + self.exposed

    def collectives(self, *, network: bool) -> float:
        """Seconds of the collectives within a slice or between slices."""
        return sum(kind.seconds for kind in self.traffic if kind.network == network)

    @property
    def bound(self) -> str:
        """What takes most of the time: "compute", "memory", "interconnect" or "network"."""
        seconds = {"compute": self.compute, "memory": self.memory}
        seconds |= {"interconnect": self.collectives(network=False), "network": self.collectives(network=True)}
        return max(seconds, key=seconds.get)


def roofline(
    program: Program, chip: Chip, places: Sequence[Place], shape: tuple[int, ...], mesh_shape: dict[str, int]
) -> Roofline:
    """The roofline of a program.

    Args:
      program: the program of one device; its groups number devices in the order of `places`.
      chip: the chip's rates.
      places: locations of the mesh's devices, in the mesh's order.
      shape: shape of one slice's torus.
      mesh_shape: mesh axis -> size, in order.
    """

    @functools.cache  # called where a collective runs, and again for the totals
    def cost(collective: Collective) -> Cost:
        group = [places[number] for number in collective.group]
        slices = len({place.slice for place in group})
        if slices > 1:
            # Each slice first reduces (or finally gathers) internally, so that its devices share the network.
            sent = collective.sent * slices / len(group) if collective.kind != "collective-permute" else collective.sent
            seconds = sent / chip.network_bandwidth
        else:
            sent = collective.sent
            open_links = links([place.coordinates for place in group], shape, chip.ring_length)
            if collective.rings is not None:
                open_links = min(open_links, 2.0 * collective.rings)
            seconds = sent / (chip.link_bandwidth * (1 if collective.kind == "collective-permute" else open_links))
        return Cost(collective.kind, axes(collective, mesh_shape), slices > 1, sent, seconds)

    exposed: dict[int, float] = defaultdict(float)
    operations = _run(program.steps, chip, cost, exposed)[0]
    sums: dict[tuple, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for collective in program.collectives:
        cost_of = cost(collective)
        total = sums[cost_of.kind, cost_of.axes, cost_of.network]
        for index, value in enumerate((cost_of.sent, cost_of.seconds, exposed[id(collective)], 1.0)):
            total[index] += value * collective.times
    return Roofline(
        compute=program.flops / chip.flops,
        memory=program.traffic / chip.hbm_bandwidth,
        operations=operations,
        traffic=tuple(Traffic(*key, *total) for key, total in sorted(sums.items(), key=lambda item: -item[1][1])),
    )


class Cost(NamedTuple):
    """The cost of one run of a collective: kind, mesh axes, whether it leaves the slice, bytes sent, seconds."""

    kind: str
    axes: tuple[str, ...]
    network: bool
    sent: float
    seconds: float


def _run(steps: Sequence[Step], chip: Chip, cost: Callable, exposed: dict[int, float]) -> tuple[float, float]:
    """(seconds of operations, seconds including exposed collectives) of sequential steps.

    A collective has exclusive use of the links of its mesh axes, so one that starts while another uses them is delayed.
    `exposed` receives the exposed seconds of one run, by the id of the collective.
    """
    clock, operations, free = 0.0, 0.0, defaultdict(float)
    ends: dict[str, tuple[Collective, float]] = {}
    for step in steps:
        for channel, collective in step.starts:
            cost_of = cost(collective)
            lanes = [(cost_of.network, axis) for axis in cost_of.axes]
            end = max([clock, *(free[lane] for lane in lanes)]) + cost_of.seconds
            free.update(dict.fromkeys(lanes, end))
            ends[channel] = collective, end
        seconds = 0.0
        if step.operation and not step.operation.asynchronous:
            seconds = max(step.operation.flops / chip.flops, step.operation.traffic / chip.hbm_bandwidth)
        busy, elapsed = _run(step.body, chip, cost, exposed) if step.body else (seconds, seconds)
        operations += step.trips * busy
        clock += step.trips * elapsed
        for channel in step.ends:
            if channel in ends:
                collective, end = ends.pop(channel)
                exposed[id(collective)] += max(0.0, end - clock)
                clock = max(clock, end)
    return operations, clock


def axes(collective: Collective, mesh_shape: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the devices of a collective's group differ."""
    positions = np.stack(np.unravel_index(list(collective.group), tuple(mesh_shape.values())))
    return tuple(name for name, row in zip(mesh_shape, positions, strict=True) if len(set(row.tolist())) > 1)


def links(coordinates: Sequence[tuple[int, ...]], shape: tuple[int, ...], ring_length: int) -> float:
    """The number of links on which each chip of a group can send at once, for the chip with the fewest.

    Along each torus axis on which the group's chips differ: two if they close a ring, one on a line; if the chips are
    not neighbors, the links between them are shared with the groups of the chips in between.
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
