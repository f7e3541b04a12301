"""The command `mlpmem plan`: what a config's programs need and cost on TPU slices that need not be here."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator

import ml_collections
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core import config as configs
from mlpmem_jax.core.accelerators import Slice, resolve
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.chips import CHIPS
from mlpmem_jax.core.errors import ArtifactError, UserError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.planning import compilation, cost, hlo, programs, report
from mlpmem_jax.planning.roofline import Place, Roofline, roofline

ASSUMED_POSITIONS = 100_000_000  # of a corpus that is not here yet: about WikiText-103's
_SMALLEST_CHUNK, _MOST_TENSOR = 128, 16


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program and what its compilation told; `roofline` is None where it does not fit a chip.

    Attributes:
      memory: "arguments", "temporaries", "results" (beyond those that take the arguments' place) and "code", bytes of
        one device.
      needs: what the compiler said that it would need, of a program that does not fit.
    """

    program: programs.StageProgram
    memory: dict[str, int]
    roofline: Roofline | None
    executed_flops: float
    needs: str = ""

    def utilization(self, tpu: Slice, chips: int) -> float:
        """Model FLOPs of a call over what the chips could do in its time."""
        return self.program.flops / (self.roofline.step * chips * CHIPS[tpu.family].flops)

    def memory_share(self, tpu: Slice) -> float:
        """What the program takes of a chip's memory, 1 for all of it."""
        return sum(self.memory.values()) / CHIPS[tpu.family].hbm_bytes

    def chip_hours(self, chips: int) -> float:
        """Of all calls of the program; 0 where it does not fit."""
        return self.roofline.step * self.program.calls * chips / 3600 if self.roofline else 0.0


def run(config: ml_collections.ConfigDict, options) -> None:
    """Compiles, prints and, where a program does not fit, exits with 1 after naming the smallest change that does.

    Args:
      config: the whole config.
      options: of the command line: topology, slices, stage, positions, json.

    Raises:
      UserError: unknown topology, config that does not fit the slices, or libtpu is missing.
    """
    tpu = resolve(options.topology, "--topology")
    positions, source = training_positions(config, options.positions)
    devices = compilation.devices(tpu, options.slices)
    stages = programs.STAGES if options.stage == "all" else (options.stage,)
    planned = [one for stage in stages for one in plan_stage(config, stage, tpu, devices, positions)]
    hosts = tpu.hosts * options.slices
    found = report.Report(
        tpu=tpu,
        slices=options.slices,
        mesh=dict(Sharding.of(config, devices).mesh.shape),
        positions=positions,
        positions_from=source,
        planned=planned,
        artifacts=cost.artifacts(config, positions, hosts),
    )
    report.show(found)
    misfits = [one for one in planned if one.roofline is None]
    changes = {}
    if misfits:
        changes = smallest_change(config, misfits[0].program.stage, tpu, devices, positions)
        words = " ".join(f"--config.{key}={value}" for key, value in changes.items())
        advice = f"It does with: {words}" if words else report.NOTHING_FITS
        print(f"{misfits[0].program.name} does not fit. {advice}")
    if options.json:
        epath.Path(options.json).write_text(json.dumps(report.to_json(found, changes), indent=1) + "\n")
    if misfits:
        sys.exit(1)


def training_positions(config: ml_collections.ConfigDict, given: int) -> tuple[int, str]:
    """(positions of the training split, where this number is from)."""
    if given:
        return given, "--positions"
    try:
        tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
        return TokenStream(tokens, "train").length, f"the tokens in {config.workdir}"
    except ArtifactError:
        return ASSUMED_POSITIONS, "assumed; say --positions=N"


def plan_stage(
    config: ml_collections.ConfigDict, stage: str, tpu: Slice, devices: list, positions: int
) -> list[Planned]:
    """Compiles the programs of one stage.

    Raises:
      UserError: the config does not fit the devices.
    """
    sharding = Sharding.of(config, devices)
    return [plan_program(program, tpu, sharding.mesh) for program in programs.build(config, stage, sharding, positions)]


def plan_program(program: programs.StageProgram, tpu: Slice, mesh: Mesh) -> Planned:
    """Compiles one program for a mesh of TPUs and reads what became of it."""
    say(f"compiling {program.stage}: {program.name}")
    try:
        text, compiled = compilation.compile_program(program.function, program.arguments, program.static)
    except compilation.DoesNotFit as error:
        return Planned(program, {}, None, 0.0, str(error))
    sizes = compiled.memory_analysis()
    read = hlo.parse(text)
    places = [Place(getattr(device, "slice_index", 0) or 0, tuple(device.coords)) for device in mesh.devices.flat]
    return Planned(
        program=program,
        memory={
            "arguments": sizes.argument_size_in_bytes,
            "temporaries": sizes.temp_size_in_bytes,
            "results": sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
            "code": sizes.generated_code_size_in_bytes,
        },
        roofline=roofline(read, CHIPS[tpu.family], places, tpu.shape, dict(mesh.shape)),
        executed_flops=read.flops,
    )


def changes(config: ml_collections.ConfigDict, stage: str) -> Iterator[dict[str, object]]:
    """Changes of a config that need less memory, the cheapest first.

    Blocks computed twice cost a third more FLOPs of theirs; smaller chunks of the loss are smaller matrix products,
    each micro-batch gathers the parameters once more, tensor parallelism moves activations. Those of the later kinds
    come with remat and the smallest chunk.
    """
    change: dict[str, object] = {}
    if stage == "train":
        training = config.training
        if not training.remat:
            change = {"training.remat": True}
            yield change
        chunk = training.loss_chunk
        while chunk >= 2 * _SMALLEST_CHUNK:
            chunk //= 2
            yield {**change, "training.loss_chunk": chunk}
        if chunk < training.loss_chunk:
            change = {**change, "training.loss_chunk": chunk}
        steps = training.accumulation_steps
        while training.batch_sequences % (2 * steps) == 0:
            steps *= 2
            yield {**change, "training.accumulation_steps": steps}
    if stage == "datastore":
        sequences = config.datastore.batch_sequences
        while sequences > 1:
            sequences //= 2
            yield {"datastore.batch_sequences": sequences}
    if stage == "neighbors":
        rows = config.targets.key_shard_rows
        while rows > 1_000_000:
            rows //= 2
            yield {"targets.key_shard_rows": rows}
        return
    tensor = config.mesh.tensor
    while 0 < tensor < _MOST_TENSOR:
        tensor *= 2
        yield {**change, "mesh.tensor": tensor}


def changed(config: ml_collections.ConfigDict, change: dict[str, object]) -> ml_collections.ConfigDict:
    """The config with other values of some keys, "group.key".

    Raises:
      ConfigError: these values are not allowed together.
    """
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.update_from_flattened_dict(change)
    configs.check(other)
    return other


def smallest_change(
    config: ml_collections.ConfigDict, stage: str, tpu: Slice, devices: list, positions: int
) -> dict[str, object]:
    """The first of `changes` with which every program of the stage compiles, less what of it is not needed; none where
    there is no such."""

    def fits(change: dict[str, object]) -> bool:
        try:
            return all(one.roofline for one in plan_stage(changed(config, change), stage, tpu, devices, positions))
        except UserError:
            return False  # the mesh cannot divide it so

    found = next(filter(fits, changes(config, stage)), {})
    for key in list(found)[:-1]:
        fewer = {name: value for name, value in found.items() if name != key}
        found = fewer if fits(fewer) else found
    return found
