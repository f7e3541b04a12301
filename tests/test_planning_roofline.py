"""Rooflines by hand, and the chips' table."""

import pytest

from mlpmem_jax.core.accelerators import GENERATIONS
from mlpmem_jax.core.chips import CHIPS, Chip
from mlpmem_jax.planning.hlo import Collective, Operation, Program, Step
from mlpmem_jax.planning.roofline import Place, axes, links, roofline

CHIP = Chip(100.0, 1, 10.0, 1.0, 0.25, 4, {})
SQUARE = [(x, y) for x in range(4) for y in range(4)]


def collective(kind="all-gather", payload=160.0, group=tuple(range(16)), times=1.0, rings=None):
    return Collective(kind, payload, group, times, rings, "")


def started_and_ended(item):
    """The step of a collective that nothing runs beside."""
    return Step(starts=(("0", item),), ends=("0",))


def work(seconds, times=1.0):
    return Step(Operation(100.0 * seconds, 0.0, times, False, ""))


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
    line = plan(Program((Step(body=(Step(operations[0]),), trips=2.0), Step(operations[1]))))
    assert (line.compute, line.memory, line.operations) == (20.0, 5.0, 20.0 + 3.0)
    assert (line.step, line.bound) == (23.0, "compute")


def test_a_collective_costs_what_the_operations_between_its_start_and_its_end_do_not_cover():
    gather = collective(payload=64.0)  # 60 bytes over four links: 15 s
    between = (work(2.0), Step(starts=(("a", gather),)), work(10.0), Step(ends=("a",)), work(20.0))
    assert plan(Program(between)).step == 2.0 + 15.0 + 20.0
    behind = (Step(starts=(("a", gather),)), work(10.0), work(20.0), Step(ends=("a",)))
    assert plan(Program(behind)).step == 30.0
    assert plan(Program((started_and_ended(gather), work(10.0)))).step == 25.0
    # In a fusion it runs beside the fusion's own products.
    assert plan(Program((Step(work(10.0).operation, (("a", gather),), ("a",)),))).step == 15.0


def test_collectives_on_the_same_links_run_one_after_the_other():
    starts = Step(starts=(("a", collective(payload=64.0)), ("b", collective(payload=64.0))))
    line = plan(Program((starts, work(20.0), Step(ends=("a", "b")))))
    assert (line.step, line.exposed) == (30.0, 10.0)


def test_a_loop_waits_in_every_turn():
    gather = collective(payload=64.0, times=3.0)
    body = (Step(starts=(("a", gather),)), work(10.0, times=3.0), Step(ends=("a",)))
    line = plan(Program((Step(body=body, trips=3.0),)))
    assert (line.operations, line.exposed, line.step) == (30.0, 15.0, 45.0)
    assert line.traffic[0].seconds == 45.0


def test_the_compilers_word_on_rings_bounds_the_links():
    assert plan(Program((started_and_ended(collective(payload=64.0, rings=1)),))).step == 30.0


def test_the_network_between_slices():
    across = collective("all-reduce", payload=8.0, group=(0, 8))
    line = plan(Program((started_and_ended(across),)), slices=2)
    assert line.collectives(network=True) == 8.0 / 0.25
    # All sixteen: every device sends its eighth of what its slice has reduced.
    line = plan(Program((started_and_ended(collective("all-gather", payload=16.0)),)), slices=2)
    assert line.traffic[0].axes == ("slice", "fsdp")
    assert line.step == 15.0 * 2 / 16 / 0.25
