"""A program of a stage, compiled for TPU slices that need not be attached: its memory and time."""

from __future__ import annotations

import dataclasses

import ml_collections
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.core.accelerators import Slice
from mlpmem_jax.core.artifacts import open_artifact
from mlpmem_jax.core.chips import CHIPS
from mlpmem_jax.core.errors import ArtifactError
from mlpmem_jax.core.progress import say
from mlpmem_jax.core.sharding import Sharding
from mlpmem_jax.corpus.tokens import TokenStream
from mlpmem_jax.planning import compilation, hlo, programs
from mlpmem_jax.planning.roofline import Place, Roofline, roofline

ASSUMED_POSITIONS = 100_000_000  # if there is no corpus yet: about WikiText-103's


@dataclasses.dataclass(frozen=True)
class Planned:
    """A program and the results of compiling it; `roofline` is None if it does not fit a chip.

    Attributes:
      memory: "arguments", "temporaries", "results" (beyond those that take the arguments' place) and "code", bytes of
        one device.
      needs: for a program that does not fit, what it would need according to the compiler.
    """

    program: programs.StageProgram
    memory: dict[str, int]
    roofline: Roofline | None
    executed_flops: float
    needs: str = ""

    def utilization(self, tpu: Slice, chips: int) -> float:
        """Model FLOPs of a call over the chips' peak FLOPs in its time."""
        return self.program.flops / (self.roofline.step * chips * CHIPS[tpu.family].flops)

    def memory_share(self, tpu: Slice) -> float:
        """The share of a chip's memory that the program uses."""
        return sum(self.memory.values()) / CHIPS[tpu.family].hbm_bytes

    def chip_hours(self, chips: int) -> float:
        """Chip-hours of all calls of the program; 0 if it does not fit."""
        return self.roofline.step * self.program.calls * chips / 3600 if self.roofline else 0.0


def training_positions(config: ml_collections.ConfigDict, given: int) -> tuple[int, str]:
    """(positions of the training split, the source of this number)."""
    if given:
        return given, "--positions"
    try:
        tokens = open_artifact(epath.Path(config.workdir) / "tokens", "tokens")
        return TokenStream(tokens, "train").length, f"the tokens in {config.workdir}"
    except ArtifactError:
        return ASSUMED_POSITIONS, "assumed; set --positions=N"


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
    """Compiles one program for a mesh of TPUs and analyzes the result."""
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
