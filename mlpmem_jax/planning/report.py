"""What `mlpmem plan` found, as tables for a terminal and as JSON."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import rich.console
import rich.table

from mlpmem_jax.core.accelerators import Slice
from mlpmem_jax.core.chips import CHIPS
from mlpmem_jax.planning.cost import ArtifactCost

if TYPE_CHECKING:
    from mlpmem_jax.planning.plan import Planned

NOTHING_FITS = "No change of remat, loss_chunk, accumulation_steps, batch or mesh.tensor makes it fit; take more chips."
UNREAD_NETWORK = (
    "No collective between slices was found in the programs' text: what they send over the data-center network is not "
    "in these times and chip-hours."
)
_MIB, _GIB = 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Report:
    """All that is shown. `mesh` maps axes to sizes, `positions` are those of the training split."""

    tpu: Slice
    slices: int
    mesh: dict[str, int]
    positions: int
    positions_from: str
    planned: list[Planned]
    artifacts: list[ArtifactCost]

    @property
    def chips(self) -> int:
        return self.tpu.chips * self.slices


def show(report: Report) -> None:
    """Prints the tables on standard output."""
    console = new_console()
    mesh = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    console.print(f"{report.slices} x {report.tpu}; mesh: {mesh}")
    console.print(f"{report.positions:,} training positions ({report.positions_from})")
    for table in (_memory(report), _times(report), _collectives(report), _artifacts(report)):
        console.print(table)
    if report.slices > 1 and not _crosses_the_network(report):
        console.print(UNREAD_NETWORK)
    hours = sum(one.chip_hours(report.chips) for one in report.planned)
    storage = sum(one.storage for one in report.artifacts)
    console.print(f"Together: {hours:,.1f} chip-hours in the programs above, {storage / 1e9:,.1f} GB stored")


def _crosses_the_network(report: Report) -> bool:
    return any(traffic.network for one in report.planned if one.roofline for traffic in one.roofline.traffic)


def new_console() -> rich.console.Console:
    """Standard output, as wide in a log file as on a terminal."""
    return rich.console.Console(width=120, highlight=False, soft_wrap=True)


def new_table(title: str, *columns: str) -> rich.table.Table:
    """A table whose first column is of text and whose others are of numbers."""
    table = rich.table.Table(title=title, title_justify="left", box=rich.table.box.SIMPLE_HEAD)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def _memory(report: Report) -> rich.table.Table:
    size = CHIPS[report.tpu.family].hbm_bytes
    title = f"Memory of one chip, MiB of {size / _MIB:,.0f}"
    table = new_table(title, "program", "arguments", "temporaries", "results", "code", "used")
    for one in report.planned:
        if one.roofline is None:
            table.add_row(one.program.name, *[""] * 4, f"does not fit. {one.needs}")
            continue
        parts = [f"{one.memory[name] / _MIB:,.0f}" for name in ("arguments", "temporaries", "results", "code")]
        table.add_row(one.program.name, *parts, f"{one.memory_share(report.tpu):.0%}")
    return table


def _times(report: Report) -> rich.table.Table:
    table = new_table(
        "Least time of one call, ms, at published peak rates; exposed: communication that no computation hides",
        *("program", "TFLOP", "matmuls", "memory", "links", "network", "exposed", "call", "most", "MFU", "chip-hours"),
    )
    for one in (one for one in report.planned if one.roofline):
        line = one.roofline
        within, between = (line.collectives(network=network) for network in (False, True))
        seconds = (line.compute, line.memory, within, between, line.exposed, line.step)
        table.add_row(
            one.program.name,
            f"{one.executed_flops / 1e12:,.2f}",
            *(f"{1e3 * second:,.2f}" for second in seconds),
            line.bound,
            f"{one.utilization(report.tpu, report.chips):.0%}",
            f"{one.chip_hours(report.chips):,.1f}",
        )
    return table


def _collectives(report: Report) -> rich.table.Table:
    columns = ("program", "kind", "mesh axes", "MB sent by a chip", "times", "ms", "exposed, ms")
    table = new_table("Collectives of one call", *columns)
    for one in (one for one in report.planned if one.roofline):
        shown = [traffic for traffic in one.roofline.traffic if traffic.seconds > 0.002 * one.roofline.step]
        for traffic in shown:
            table.add_row(
                one.program.name,
                traffic.kind,
                ", ".join(traffic.axes) + (" (network)" if traffic.network else ""),
                f"{traffic.bytes / 1e6:,.1f}",
                f"{traffic.times:,.0f}",
                f"{1e3 * traffic.seconds:,.2f}",
                f"{1e3 * traffic.exposed:,.2f}",
            )
    return table


def _artifacts(report: Report) -> rich.table.Table:
    table = new_table("Artifacts", "artifact", "GB stored", "GiB in a host's memory", "")
    for one in report.artifacts:
        table.add_row(one.name, f"{one.storage / 1e9:,.1f}", f"{one.host / _GIB:,.1f}", one.note)
    return table


def to_json(report: Report, changes: dict) -> dict:
    """The report as JSON values; bytes, seconds, FLOPs."""
    rows = []
    for one in report.planned:
        row = {
            "name": one.program.name,
            "stage": one.program.stage,
            "fits": one.roofline is not None,
            "needs": one.needs,
            "memory": one.memory,
            "model_flops": one.program.flops,
            "positions": one.program.positions,
            "calls": one.program.calls,
        }
        if one.roofline:
            line = one.roofline
            row |= {
                "executed_flops_per_chip": one.executed_flops,
                "seconds": {
                    "compute": line.compute,
                    "memory": line.memory,
                    "operations": line.operations,
                    "exposed": line.exposed,
                    "call": line.step,
                },
                "collectives": [dataclasses.asdict(traffic) for traffic in line.traffic],
                "bound": line.bound,
                "utilization": one.utilization(report.tpu, report.chips),
                "chip_hours": one.chip_hours(report.chips),
            }
        rows.append(row)
    return {
        "topology": f"{report.tpu.family}:{report.tpu.topology}",
        "slices": report.slices,
        "chips": report.chips,
        "mesh": report.mesh,
        "positions": report.positions,
        "programs": rows,
        "artifacts": [dataclasses.asdict(one) for one in report.artifacts],
        "network_is_read": report.slices == 1 or _crosses_the_network(report),
        "changes_that_fit": changes,
    }
