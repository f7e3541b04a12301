"""Rooflines by hand, and the chips' table."""

import pytest

from mlpmem_jax.core.accelerators import GENERATIONS
from mlpmem_jax.planning.chips import CHIPS, Chip
from mlpmem_jax.planning.hlo import Collective, Operation, Program
from mlpmem_jax.planning.roofline import Place, axes, links, roofline

CHIP = Chip(100.0, 1, 10.0, 1.0, 0.25, 4, {})
SQUARE = [(x, y) for x in range(4) for y in range(4)]


def collective(kind="all-gather", payload=160.0, group=tuple(range(16)), times=1.0, overlapped=False, rings=None):
    return Collective(kind, payload, group, times, overlapped, rings, "")


def test_the_table_has_every_generation_and_plausible_rates():
    assert set(CHIPS) == set(GENERATIONS)
    # All-reduce bandwidth per pod as documented, 51.2 and 102.4 TB/s: 256 chips, half of both directions of four ports.
    assert CHIPS["v5e"].link_bandwidth * 4 * 256 == 51.2e12
    assert CHIPS["v6e"].link_bandwidth * 4 * 256 == 102.4e12
    # Peak of a whole pod, 50.63 PFLOPs (bfloat16), and its network, 6.4 Tbit/s.
    assert CHIPS["v5e"].flops * 256 == pytest.approx(50.63e15, rel=0.01)
    assert CHIPS["v5e"].network_bandwidth * 256 * 8 == 6.4e12
    assert CHIPS["v6e"].network_bandwidth * 256 * 8 == 25.6e12


@pytest.mark.parametrize(
    ("coordinates", "shape", "expected"),
    [
        (SQUARE, (4, 4), 4),  # two rings
        ([(x, 0) for x in range(4)], (4, 4), 2),  # one ring
        ([(x, 0) for x in range(2)], (4, 4), 1),  # two neighbors of a ring
        ([(0, 0), (2, 0)], (4, 4), 1),  # every other chip: both ways round, links shared
        ([(x, 0) for x in range(3)], (3, 4), 1),  # a line: three chips close no ring
        ([(x, y) for x in range(4) for y in range(2)], (4, 4), 3),
    ],
)
def test_links_of_a_group(coordinates, shape, expected):
    assert links(coordinates, shape, 4) == expected


def test_axes_of_a_group():
    shape = {"slice": 2, "fsdp": 4, "tensor": 2}
    assert axes(collective(group=(0, 2, 4, 6)), shape) == ("fsdp",)
    assert axes(collective(group=(0, 1)), shape) == ("tensor",)
    assert axes(collective(group=(0, 8)), shape) == ("slice",)
    assert axes(collective(group=tuple(range(16))), shape) == ("slice", "fsdp", "tensor")


def plan(program, slices=1):
    places = [Place(number // (16 // slices), SQUARE[number % (16 // slices)]) for number in range(16)]
    return roofline(program, CHIP, places, (4, 4), {"slice": slices, "fsdp": 16 // slices, "tensor": 1})


def test_operations_one_after_the_other_each_at_its_own_limit():
    operations = (Operation(1000.0, 10.0, 2.0, False, ""), Operation(0.0, 30.0, 1.0, False, ""))
    line = plan(Program((), operations))
    assert (line.compute, line.memory, line.operations) == (20.0, 5.0, 20.0 + 3.0)
    assert (line.step, line.bound) == (23.0, "compute")


def test_collectives_beside_other_work_and_those_that_are_waited_for():
    work = (Operation(1000.0, 0.0, 1.0, False, ""),)  # 10 s
    gather = collective(payload=640.0, overlapped=True)  # 600 bytes over four links: 150 s
    line = plan(Program((gather,), work))
    assert line.step == 150.0
    assert line.bound == "interconnect"
    line = plan(Program((collective(payload=64.0, overlapped=True), collective("all-reduce", 64.0, times=3.0)), work))
    assert line.step == max(10.0, 15.0) + 3 * 30.0
    # Where the compiler says that it uses one ring, two of the four links carry it all.
    assert plan(Program((collective(payload=64.0, rings=1),), work)).step == 10.0 + 30.0


def test_the_network_between_slices():
    across = collective("all-reduce", payload=8.0, group=(0, 8))
    line = plan(Program((across,), ()), slices=2)
    assert line.collectives(network=True, overlapped=False) == 8.0 / 0.25
    # All sixteen: every device sends its eighth of what its slice has reduced.
    line = plan(Program((collective("all-gather", payload=16.0),), ()), slices=2)
    assert line.traffic[0].axes == ("slice", "fsdp")
    assert line.step == 15.0 * 2 / 16 / 0.25
