"""Parses the text of an optimized HLO module into computations of instructions; `hlo` computes their costs."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

_DTYPE_BYTES = {
    "pred": 1,
    "s4": 0.5,
    "u4": 0.5,
    "s8": 1,
    "u8": 1,
    "s16": 2,
    "u16": 2,
    "bf16": 2,
    "f16": 2,
    "s32": 4,
    "u32": 4,
    "f32": 4,
    "s64": 8,
    "u64": 8,
    "f64": 8,
    "c64": 8,
}
_SHAPE = re.compile(r"([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array; `space` is 0 for main memory."""

    dtype: str
    sizes: tuple[int, ...]
    space: int

    @property
    def bytes(self) -> float:
        return math.prod(self.sizes) * _DTYPE_BYTES.get(self.dtype, 1)

    @property
    def traffic(self) -> float:
        """Bytes of main memory; 0 if the array is in the chip's on-chip memory."""
        return self.bytes if self.space == 0 else 0


@dataclasses.dataclass(frozen=True)
class Instruction:
    name: str
    shapes: tuple[Shape, ...]
    opcode: str
    operands: tuple[str, ...]
    attributes: str

    def named(self, attribute: str) -> str | None:
        """The computation that an attribute such as `calls` or `body` names."""
        match = re.search(rf"\b{attribute}=\{{?%?([\w.\-]+)", self.attributes)
        return match and match[1]


class Module:
    """The computations of a module.

    Attributes:
      computations: name -> its instructions by name, in execution order.
      roots: name -> the instruction whose result is the computation's.
      entry: name of the computation that a call of the program runs.
    """

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.roots: dict[str, Instruction] = {}
        self.entry = ""
        name = ""
        for line in text.splitlines():
            line = _COMMENT.sub("", line)
            if not line.startswith(" "):
                header = _HEADER.match(line)
                if header:
                    name = header[2]
                    self.computations[name] = {}
                    self.entry = name if header[1] else self.entry
            elif name and " = " in line:
                instruction = _instruction(line)
                self.computations[name][instruction.name] = instruction
                if line.lstrip().startswith("ROOT "):
                    self.roots[name] = instruction
        if not self.entry:
            raise ValueError("not the text of an optimized HLO module: it has no ENTRY computation")

    def trip_count(self, loop: Instruction) -> int:
        """How often a counted loop runs: the compiler's note, or the counter's bound divided by its step.

        Raises:
          ValueError: the bound cannot be read.
        """
        note = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
        if note:
            return int(note[1])
        condition = loop.named("condition")
        constants = [
            int(op.operands[0])
            for op in self.inside(condition)
            if op.opcode == "constant" and op.shapes[0].dtype in ("s32", "u32", "s64") and not op.shapes[0].sizes
        ]
        if len(constants) != 1:
            raise ValueError(f"{loop.name}: the trip count of this loop cannot be read from {condition}")
        return -(-constants[0] // self._step(loop))

    def _step(self, loop: Instruction) -> int:
        """What one trip adds to the counter; more than 1 if the compiler has merged several trips."""
        body = self.computations[loop.named("body")]
        condition = self.computations[loop.named("condition")].values()
        places = [re.search(r"index=(\d+)", op.attributes) for op in condition if op.opcode == "get-tuple-element"]
        if len(places) != 1:
            return 1
        counter = body[self.roots[loop.named("body")].operands[int(places[0][1])]]
        step = 0
        while counter.opcode == "add":
            left, right = (body[name] for name in counter.operands)
            constant, counter = (left, right) if left.opcode == "constant" else (right, left)
            if constant.opcode != "constant":
                return 1
            step += int(constant.operands[0])
        return step or 1

    def inside(self, name: str) -> Iterator[Instruction]:
        """The instructions of a computation and of the fusions in it."""
        for instruction in self.computations[name].values():
            yield instruction
            called = instruction.named("calls") if instruction.opcode in ("fusion", "async-start") else None
            if instruction.opcode in ("call", "custom-call"):  # of a sparse core
                called = instruction.named("to_apply") or instruction.named("called_computations")
            if called:
                yield from self.inside(called)

    @functools.cached_property
    def _homes(self) -> dict[int, str]:
        return {id(op): name for name, body in self.computations.items() for op in body.values()}

    def body_of(self, instruction: Instruction) -> dict[str, Instruction]:
        """The computation that an instruction is in."""
        return self.computations[self._homes[id(instruction)]]

    def shapes_of(self, instruction: Instruction, operand: str) -> tuple[Shape, ...]:
        """The arrays in an operand of an instruction."""
        definition = self.body_of(instruction).get(operand)
        return definition.shapes if definition else ()


def called_by(instruction: Instruction) -> list[str]:
    """The computations that a call or a conditional runs, including all branches."""
    if instruction.opcode == "call":
        return [instruction.named("to_apply")]
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = branches[1].split(",") if branches else []
    names += [instruction.named(f"{truth}_computation") for truth in ("true", "false")]
    return [name.strip().lstrip("%") for name in names if name]


def _instruction(line: str) -> Instruction:
    name, _, rest = line.strip().removeprefix("ROOT ").partition(" = ")
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shapes, rest = rest[:end], rest[end:].lstrip()
    start = rest.index("(")
    stop = _closing(rest, start)
    operands = re.findall(r"%([\w.\-]+)", rest[start:stop]) or [rest[start + 1 : stop]]
    return Instruction(
        name=name.removeprefix("%"),
        shapes=tuple(_shape(*match) for match in _SHAPE.findall(shapes)),
        opcode=rest[:start],
        operands=tuple(operand for operand in operands if operand),
        attributes=rest[stop + 1 :],
    )


def _shape(dtype: str, sizes: str, layout: str) -> Shape:
    space = re.search(r"S\((\d+)\)", layout)
    return Shape(dtype, tuple(int(size) for size in sizes.split(",") if size), int(space[1]) if space else 0)


def _closing(text: str, start: int) -> int:
    depth = 0
    for place in range(start, len(text)):
        depth += (text[place] == "(") - (text[place] == ")")
        if depth == 0:
            return place
    raise ValueError(f"unbalanced parentheses in HLO: {text[:80]}")


def first_group(attributes: str) -> tuple[int, ...]:
    """The devices of the first group of a collective, in one of the four forms in which HLO writes groups.

    Raises:
      ValueError: the form is another one.
    """
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", attributes):
        return int(pairs[1]), int(pairs[2])
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        return tuple(_numbered(iota[2], iota[3]).reshape([int(size) for size in iota[1].split(",")])[0].tolist())
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}:]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        order = re.match(r"\[([\d,]+)\](?:T\(([\d,]+))?", mesh[2] or f"[{math.prod(sizes.values())}]")
        taking_part = re.findall(r"'(\w+)'", mesh[3])
        devices = _numbered(order[1], order[2]).reshape(tuple(sizes.values()))
        first = tuple(slice(None) if name in taking_part else 0 for name in sizes)
        return tuple(devices[first].reshape(-1).tolist())
    raise ValueError(f"groups of a collective in an unknown form: {attributes[:120]}")


def _numbered(sizes: str, permutation: str | None) -> np.ndarray:
    """Devices 0, 1, ... in an array of the sizes, its axes permuted."""
    shape = [int(size) for size in sizes.split(",")]
    devices = np.arange(math.prod(shape)).reshape(shape)
    return devices.transpose([int(axis) for axis in permutation.split(",")]) if permutation else devices
