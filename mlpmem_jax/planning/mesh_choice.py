"""`mlpmem plan --meshes`: compares the train step on meshes of every `tensor` size and names the fastest."""

from __future__ import annotations

import dataclasses
import json
import sys

import ml_collections
from etils import epath

from mlpmem_jax.core.accelerators import Slice, resolve
from mlpmem_jax.core.errors import UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.planning import compilation, programs, tables
from mlpmem_jax.planning.changes import changed
from mlpmem_jax.planning.planned import Planned, plan_program, training_positions

_TENSOR = (1, 2, 4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Choice:
    """The train step on one mesh; `planned` is None, and `refusal` says why, if the config does not fit the mesh."""

    tensor: int
    fsdp: int
    planned: Planned | None
    refusal: str = ""

    @property
    def runs(self) -> bool:
        return self.planned is not None and self.planned.roofline is not None


def run(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    slices: int = 1,
    positions: int = 0,
    json_file: str | None = None,
) -> None:
    """Compiles, prints a table and the fastest mesh as an override; exits with 1 if none fits.

    Args:
      config: the whole config; `mesh.tensor` and `mesh.fsdp` are varied.
      topology, slices, positions, json_file: as in `plan.run`.

    Raises:
      UserError: unknown topology, or libtpu is missing.
    """
    tpu = resolve(topology, "--topology")
    positions, source = training_positions(config, positions)
    devices = compilation.devices(tpu, slices)
    choices = [choose(config, tensor, tpu, devices, positions) for tensor in _TENSOR]
    best = fastest(choices)
    console = tables.new_console()
    console.print(f"{slices} x {tpu}; {positions:,} training positions ({source})")
    console.print(_table(choices, tpu, len(devices)))
    if json_file:
        meshes = [_to_json(choice, tpu, len(devices)) for choice in choices]
        content = {"meshes": meshes, "fastest": best and best.tensor}
        epath.Path(json_file).write_text(json.dumps(content, indent=1) + "\n")
    if best is None:
        print("The train step fits none of these meshes; mlpmem plan without --meshes says what to change.")
        sys.exit(1)
    print(f"The fastest is --config.mesh.tensor={best.tensor}")


def choose(config: ml_collections.ConfigDict, tensor: int, tpu: Slice, devices: list, positions: int) -> Choice:
    """The train step with the devices of a slice in groups of `tensor`."""
    fsdp = len(devices) // tensor // max(config.mesh.slice, 1)
    try:
        other = changed(config, {"mesh.tensor": tensor, "mesh.fsdp": -1})
        sharding = Sharding.of(other, devices)
        step = programs.build(other, "train", sharding, positions)[0]
    except UserError as error:
        return Choice(tensor, fsdp, None, str(error))
    fsdp = sharding.mesh.shape["fsdp"]
    say(f"mesh.tensor={tensor}, fsdp={fsdp}")
    return Choice(tensor, fsdp, plan_program(step, tpu, sharding.mesh))


def fastest(choices: list[Choice]) -> Choice | None:
    """The choice with the shortest step among those that fit; None if none does."""
    running = [choice for choice in choices if choice.runs]
    return min(running, key=lambda choice: choice.planned.roofline.step, default=None)


def _table(choices: list[Choice], tpu: Slice, chips: int):
    columns = ("mesh.tensor", "fsdp", "memory used", "operations", "exposed", "step", "MFU", "chip-hours", "")
    table = tables.new_table("Train step by mesh, ms at published peak rates", *columns)
    for choice in choices:
        if not choice.runs:
            why = choice.refusal or f"does not fit. {choice.planned.needs}"
            table.add_row(str(choice.tensor), str(choice.fsdp), *[""] * 6, why.split(";")[0])
            continue
        line, planned = choice.planned.roofline, choice.planned
        milliseconds = (f"{1e3 * seconds:,.1f}" for seconds in (line.operations, line.exposed, line.step))
        utilization = f"{planned.utilization(tpu, chips):.0%}"
        used, hours = f"{planned.memory_share(tpu):.0%}", f"{planned.chip_hours(chips):,.1f}"
        table.add_row(str(choice.tensor), str(choice.fsdp), used, *milliseconds, utilization, hours)
    return table


def _to_json(choice: Choice, tpu: Slice, chips: int) -> dict:
    values = {"tensor": choice.tensor, "fsdp": choice.fsdp, "fits": choice.runs}
    if not choice.runs:
        return values | {"reason": choice.refusal or choice.planned.needs}
    line = choice.planned.roofline
    seconds = {"operations": line.operations, "exposed": line.exposed, "step": line.step}
    return values | {
        "memory": choice.planned.memory,
        "seconds": seconds,
        "utilization": choice.planned.utilization(tpu, chips),
        "chip_hours": choice.planned.chip_hours(chips),
    }
