"""The command `mlpmem plan`: what a config's programs need and cost on TPU slices, which need not be attached."""

from __future__ import annotations

import json
import sys

import ml_collections
from etils import epath

from mlpmem_jax.core.accelerators import resolve
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.planning import compilation, cost, host_search, programs, tables
from mlpmem_jax.planning.changes import smallest_change
from mlpmem_jax.planning.planned import plan_stage, training_positions


def run(
    config: ml_collections.ConfigDict,
    topology: str,
    *,
    stage: str = "train",
    slices: int = 1,
    positions: int = 0,
    json_file: str | None = None,
) -> None:
    """Compiles and prints a plan; if a program does not fit, names the smallest change that does and exits with 1.

    Args:
      config: the whole config.
      topology: one slice, e.g. "v5e:16x16".
      stage: one of `programs.STAGES`, or "all".
      slices: number of slices, connected by the data-center network.
      positions: positions of the training split; 0 = those of the tokens in the workdir.
      json_file: file for the plan as JSON, if any.

    Raises:
      UserError: the topology is unknown, the config does not fit the slices, or libtpu is missing.
    """
    tpu = resolve(topology, "--topology")
    positions, source = training_positions(config, positions)
    devices = compilation.devices(tpu, slices)
    stages = programs.STAGES if stage == "all" else (stage,)
    planned = [program for name in stages for program in plan_stage(config, name, tpu, devices, positions)]
    plan = tables.Plan(
        tpu=tpu,
        slices=slices,
        mesh=dict(Sharding.of(config, devices).mesh.shape),
        positions=positions,
        positions_from=source,
        planned=planned,
        artifacts=cost.artifacts(config, positions, tpu.hosts * slices, tpu.cpus_per_host),
        gpu_process=cost.targets_memory(config, programs.models_of(config, 1), positions, *tables.GPU_NODE),
        host_search=host_search.plan(config, positions, tpu, slices) if "neighbors" in stages else None,
    )
    tables.show(plan)
    misfits = [program for program in planned if program.roofline is None]
    change = {}
    if misfits:
        change = smallest_change(config, misfits[0].program.stage, tpu, devices, positions)
        words = " ".join(f"--config.{key}={value}" for key, value in change.items())
        print(f"{misfits[0].program.name} does not fit. {f'It does with: {words}' if words else tables.NOTHING_FITS}")
    if json_file:
        epath.Path(json_file).write_text(json.dumps(tables.to_json(plan, change), indent=1) + "\n")
    if misfits:
        sys.exit(1)
