"""The result of `mlpmem plan`, as tables for a terminal and as JSON."""

from __future__ import annotations

import dataclasses

import rich.console
import rich.table

from mlpmem_jax.core.accelerators import Slice
from mlpmem_jax.core.chips import CHIPS
from mlpmem_jax.planning.cost import ArtifactCost
from mlpmem_jax.planning.host_search import HostSearch
from mlpmem_jax.planning.planned import Planned

NOTHING_FITS = "No change of remat, loss_chunk, accumulation_steps, batch or mesh.tensor makes it fit; use more chips."
UNREAD_NETWORK = (
    "No collective between slices was found in the programs' text: communication over the data-center network is not "
    "included in these times and chip-hours."
)
GPU_NODE = 8, 8
"""Processes of a node, one per GPU, and CPUs of each, the default of launch.slurm."""
_MIB, _GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """The contents of the tables.

    Attributes:
      mesh: size of each axis.
      positions: positions of the training split.
      gpu_process: memory of stage `targets` in a process of a `GPU_NODE`.
      host_search: None if the neighbors are not planned, or are searched on the chips.
    """

    tpu: Slice
    slices: int
    mesh: dict[str, int]
    positions: int
    positions_from: str
    planned: list[Planned]
    artifacts: list[ArtifactCost]
    gpu_process: int
    host_search: HostSearch | None = None

    @property
    def chips(self) -> int:
        return self.tpu.chips * self.slices


def show(plan: Plan) -> None:
    """Prints the tables on standard output."""
    console = new_console()
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    console.print(f"{plan.slices} x {plan.tpu}; mesh: {mesh}")
    console.print(f"{plan.positions:,} training positions ({plan.positions_from})")
    for table in (_memory(plan), _times(plan), _collectives(plan), _artifacts(plan)):
        if table.row_count:
            console.print(table)
    processes, cpus = GPU_NODE
    console.print(
        f"On one node of {processes} GPUs instead, with a process of {cpus} CPUs for each, stage targets takes "
        f"{plan.gpu_process / _GIB:,.1f} GiB of memory in each process, {processes * plan.gpu_process / _GIB:,.1f} GiB "
        "together"
    )
    if plan.host_search:
        console.print(str(plan.host_search))
    if plan.slices > 1 and not _crosses_the_network(plan):
        console.print(UNREAD_NETWORK)
    hours = sum(planned.chip_hours(plan.chips) for planned in plan.planned)
    kept, most = _storage(plan.artifacts)
    held = f"{plan.host_search.chip_hours:,.1f} held during the search, " if plan.host_search else ""
    console.print(
        f"Together: {hours:,.1f} chip-hours in the programs above, {held}{kept / 1e9:,.1f} GB stored in the end, "
        f"{most / 1e9:,.1f} GB at most"
    )


def _storage(artifacts: list[ArtifactCost]) -> tuple[float, float]:
    """(bytes of all artifacts, the most bytes at any time): artifacts are in the order in which they are made."""
    kept = most = 0.0
    for artifact in artifacts:
        most = max(most, kept + artifact.storage)
        kept += artifact.storage * artifact.is_kept
    return kept, most


def _crosses_the_network(plan: Plan) -> bool:
    return any(traffic.network for planned in plan.planned if planned.roofline for traffic in planned.roofline.traffic)


def new_console() -> rich.console.Console:
    """A console on standard output, as wide in a log file as on a terminal."""
    return rich.console.Console(width=120, highlight=False, soft_wrap=True)


def new_table(title: str, *columns: str) -> rich.table.Table:
    """A table whose first column is text and whose other columns are numbers."""
    table = rich.table.Table(title=title, title_justify="left", box=rich.table.box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _memory(plan: Plan) -> rich.table.Table:
    size = CHIPS[plan.tpu.family].hbm_bytes
    title = f"Memory of one chip, MiB of {size / _MIB:,.0f}"
    table = new_table(title, "program", "arguments", "temporaries", "results", "code", "used")
    for planned in plan.planned:
        if planned.roofline is None:
            table.add_row(planned.program.name, *[""] * 4, f"does not fit. {planned.needs}")
            continue
        parts = [f"{planned.memory[name] / _MIB:,.0f}" for name in ("arguments", "temporaries", "results", "code")]
        table.add_row(planned.program.name, *parts, f"{planned.memory_share(plan.tpu):.0%}")
    return table


def _times(plan: Plan) -> rich.table.Table:
    table = new_table(
        "Minimum time of one call, ms, at published peak rates; exposed: communication that no computation hides",
        *("program", "TFLOP", "matmuls", "memory", "links", "network", "exposed", "call", "most", "MFU", "chip-hours"),
    )
    for planned in (planned for planned in plan.planned if planned.roofline):
        line = planned.roofline
        within, between = (line.collectives(network=network) for network in (False, True))
        seconds = (line.compute, line.memory, within, between, line.exposed, line.step)
        table.add_row(
            planned.program.name,
            f"{planned.executed_flops / 1e12:,.2f}",
            *(f"{1e3 * second:,.2f}" for second in seconds),
            line.bound,
            f"{planned.utilization(plan.tpu, plan.chips):.0%}",
            f"{planned.chip_hours(plan.chips):,.1f}",
        )
    return table


def _collectives(plan: Plan) -> rich.table.Table:
    columns = ("program", "kind", "mesh axes", "MB sent by a chip", "times", "ms", "exposed, ms")
    table = new_table("Collectives of one call", *columns)
    for planned in (planned for planned in plan.planned if planned.roofline):
        shown = [traffic for traffic in planned.roofline.traffic if traffic.seconds > 0.002 * planned.roofline.step]
        for traffic in shown:
            table.add_row(
                planned.program.name,
                traffic.kind,
                ", ".join(traffic.axes) + (" (network)" if traffic.network else ""),
                f"{traffic.bytes / 1e6:,.1f}",
                f"{traffic.times:,.0f}",
                f"{1e3 * traffic.seconds:,.2f}",
                f"{1e3 * traffic.exposed:,.2f}",
            )
    return table


def _artifacts(plan: Plan) -> rich.table.Table:
    table = new_table("Artifacts", "artifact", "GB stored", "GiB in a host's memory", "")
    for artifact in plan.artifacts:
        table.add_row(artifact.name, f"{artifact.storage / 1e9:,.1f}", f"{artifact.host / _GIB:,.1f}", artifact.note)
    return table


def to_json(plan: Plan, changes: dict) -> dict:
    """The plan as JSON values; bytes, seconds, FLOPs."""
    rows = []
    for planned in plan.planned:
        row = {
            "name": planned.program.name,
            "stage": planned.program.stage,
            "fits": planned.roofline is not None,
            "needs": planned.needs,
            "memory": planned.memory,
            "model_flops": planned.program.flops,
            "positions": planned.program.positions,
            "calls": planned.program.calls,
        }
        if planned.roofline:
            line = planned.roofline
            row |= {
                "executed_flops_per_chip": planned.executed_flops,
                "seconds": {
                    "compute": line.compute,
                    "memory": line.memory,
                    "operations": line.operations,
                    "exposed": line.exposed,
                    "call": line.step,
                },
                "collectives": [dataclasses.asdict(traffic) for traffic in line.traffic],
                "bound": line.bound,
                "utilization": planned.utilization(plan.tpu, plan.chips),
                "chip_hours": planned.chip_hours(plan.chips),
            }
        rows.append(row)
    return {
        "topology": f"{plan.tpu.family}:{plan.tpu.topology}",
        "slices": plan.slices,
        "chips": plan.chips,
        "mesh": plan.mesh,
        "positions": plan.positions,
        "programs": rows,
        "gpu_node": {"processes": GPU_NODE[0], "memory_of_process": plan.gpu_process},
        "host_search": _host_search_to_json(plan.host_search),
        "artifacts": [dataclasses.asdict(artifact) for artifact in plan.artifacts],
        "network_is_read": plan.slices == 1 or _crosses_the_network(plan),
        "changes_that_fit": changes,
    }


def _host_search_to_json(search: HostSearch | None) -> dict | None:
    return search and {**dataclasses.asdict(search), "hours": search.hours, "chip_hours": search.chip_hours}
