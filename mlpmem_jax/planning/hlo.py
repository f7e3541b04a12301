"""What a compiled program does, read from the text of its optimized HLO: FLOPs, memory traffic, collectives.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

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
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_FREE = {
    "parameter",
    "constant",
    "get-tuple-element",
    "tuple",
    "bitcast",
    "while",
    "conditional",
    "call",
    "after-all",
    "partition-id",
    "replica-id",
    "iota",
    "opt-barrier",
    "optimization-barrier",
}
_COMMENT = re.compile(r"/\*.*?\*/")
_PARTIAL_READS = ("dynamic-slice", "slice", "gather")


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
        """Bytes of main memory: none where the array lies in the chip's own memory."""
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


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      payload: bytes of the whole array: what is gathered, reduced, or sent.
      group: device numbers (positions in the mesh) that take part together; of a permutation, one sender and its
        receiver.
      times: how often it runs in one call of the program.
      rings: torus axes that the compiler says it uses at once; None where it does not say.
      name: of the instruction.
    """

    kind: str
    payload: float
    group: tuple[int, ...]
    times: float
    rings: int | None
    name: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends (and receives) in one run, by the bandwidth-optimal algorithm."""
        if self.kind == "collective-permute":
            return self.payload
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.payload * (len(self.group) - 1) / len(self.group)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction on the device: FLOPs of matrix products and bytes of main memory, of one run."""

    flops: float
    traffic: float
    times: float
    asynchronous: bool
    name: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One place in the order in which a device runs its program.

    Attributes:
      operation: what is computed here, if anything.
      starts: (channel, collective) for each that starts before the operation.
      ends: channels whose collectives are waited for after the operation.
      body: steps that are run here `trips` times.
    """

    operation: Operation | None = None
    starts: tuple[tuple[str, Collective], ...] = ()
    ends: tuple[str, ...] = ()
    body: tuple[Step, ...] = ()
    trips: float = 1.0


@dataclasses.dataclass(frozen=True)
class Program:
    """The steps of one device. In `collectives` and `operations` each stands once, with how often it runs."""

    steps: tuple[Step, ...]

    @functools.cached_property
    def _all(self) -> tuple[Step, ...]:
        def flat(steps: tuple[Step, ...]) -> Iterator[Step]:
            for step in steps:
                yield step
                yield from flat(step.body)

        return tuple(flat(self.steps))

    @property
    def collectives(self) -> tuple[Collective, ...]:
        return tuple(collective for step in self._all for _, collective in step.starts)

    @property
    def operations(self) -> tuple[Operation, ...]:
        return tuple(step.operation for step in self._all if step.operation)

    @property
    def flops(self) -> float:
        """Of matrix products, on one device; recomputation included."""
        return sum(operation.flops * operation.times for operation in self.operations)

    @property
    def traffic(self) -> float:
        """Bytes read from and written to main memory, on one device."""
        return sum(operation.traffic * operation.times for operation in self.operations)


def parse(text: str) -> Program:
    """Reads the text of an optimized HLO module; the compiler writes instructions in the order in which they run.

    Raises:
      ValueError: the text is not such a module, or the trip count of a loop cannot be read.
    """
    module = _Module(text)
    return Program(tuple(module.steps(module.entry, 1.0)))


class _Module:
    """The computations of a module, and what its instructions cost."""

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

    def steps(self, name: str, times: float, around: Mapping[str, Collective] | None = None) -> Iterator[Step]:
        """The steps of a computation, and in them those of its loops, branches and calls, but not of fusions.

        Fusions that only continue a collective of `around` (by channel, those in flight around this computation) do
        not count as collectives of their own.
        """
        body = self.computations[name]
        pending = dict(around or {})
        channels_of = {
            op.name: [
                (channel, is_start, collective)
                for channel, is_start, collective in self.collectives(op, times)
                if is_start or not _continues(collective, pending.get(channel))
            ]
            for op in body.values()
        }
        # The fusions that start an asynchronous collective, continue it and end it all name its channel.
        last = {channel: op for op, channels in channels_of.items() for channel, _, _ in channels}
        fused = {channel for channels in channels_of.values() for channel, is_start, _ in channels if is_start}
        waiting: dict[str, tuple[tuple[str, Collective], ...]] = {}  # instruction -> started by it, or about to be
        for op in body.values():
            if op.opcode == "while":
                trips = self._trip_count(op)
                yield Step(body=tuple(self.steps(op.named("body"), times * trips, pending)), trips=trips)
                continue
            if op.opcode in ("call", "conditional"):
                for called in _called(op):
                    yield Step(body=tuple(self.steps(called, times, pending)))
                continue
            starts = tuple(
                (c, collective) for c, is_start, collective in channels_of[op.name] if is_start or c not in fused
            )
            ends = tuple(channel for channel, _, _ in channels_of[op.name] if last[channel] == op.name)
            if op.opcode.endswith("-start"):
                waiting[op.name], ends = starts, ()
                starts = starts if op.operands else ()  # a sparse core gets its operands with the first update
            elif op.opcode == "async-update":
                waiting[op.name] = starts = waiting.pop(op.operands[0], ())
            elif op.opcode.endswith("-done"):
                ends = tuple(channel for channel, _ in waiting.pop(op.operands[0], ()))
            pending |= {channel: collective for channel, is_start, collective in channels_of[op.name] if is_start}
            for channel in ends:
                pending.pop(channel, None)
            operation = self.operation(op, times)
            if operation or starts or ends:
                yield Step(operation, starts, ends)

    def _trip_count(self, loop: Instruction) -> int:
        """Of a counted loop: the compiler's note, or the constant that the counter is compared with over its step."""
        note = re.search(r"known_trip_count[^\d]*(\d+)", loop.attributes)
        if note:
            return int(note[1])
        condition = loop.named("condition")
        constants = [
            int(op.operands[0])
            for op in self._inside(condition)
            if op.opcode == "constant" and op.shapes[0].dtype in ("s32", "u32", "s64") and not op.shapes[0].sizes
        ]
        if len(constants) != 1:
            raise ValueError(f"{loop.name}: the trip count of this loop cannot be read from {condition}")
        return -(-constants[0] // self._step(loop))

    def _step(self, loop: Instruction) -> int:
        """What a turn adds to the counter; more than 1 where the compiler has put several trips into one."""
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

    def _inside(self, name: str) -> Iterator[Instruction]:
        """The instructions of a computation and of the fusions in it."""
        for instruction in self.computations[name].values():
            yield instruction
            called = instruction.named("calls") if instruction.opcode in ("fusion", "async-start") else None
            if instruction.opcode in ("call", "custom-call"):  # of a sparse core
                called = instruction.named("to_apply") or instruction.named("called_computations")
            if called:
                yield from self._inside(called)

    def collectives(self, instruction: Instruction, times: float) -> Iterator[tuple[str, bool, Collective]]:
        """(channel, whether a fusion starts it, collective) for each that an instruction is, or that is inside it."""
        called = instruction.named("calls") if instruction.opcode in ("fusion", "async-start") else None
        inside = list(self._inside(called)) if called else [instruction]
        is_start = any("AsyncCollectiveStart" in inner.attributes for inner in inside)
        for inner in inside:
            kind = inner.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sent = sum(shape.bytes for name in inner.operands for shape in self._shape_of(inner, name))
            # An asynchronous one has its operands among its results.
            received = sum(shape.bytes for shape in inner.shapes) - sent * inner.opcode.endswith("-start")
            if kind == "all-reduce" and called and _is_slice(self.computations[called], self.roots[called]):
                kind = "reduce-scatter"  # TPUs hold one as an all-reduce and the slice that is kept, in one fusion
            channel = re.search(r"channel_id=(\d+)", inner.attributes)
            rings = re.search(r"Strategy\w+\{colors:(\d+)", inner.attributes + instruction.attributes)
            # Only a fusion that continues a collective of another one shares its channel within a computation.
            shared = channel and (is_start or instruction.opcode == "fusion")
            yield (
                channel[1] if shared else inner.name,
                is_start,
                Collective(
                    kind=kind,
                    payload=max(sent, received),
                    group=_group(inner.attributes),
                    times=times,
                    rings=int(rings[1]) if rings else None,
                    name=inner.name,
                ),
            )

    def operation(self, instruction: Instruction, times: float) -> Operation | None:
        """What an instruction costs by itself; None where it costs nothing."""
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done") or instruction.opcode in COLLECTIVES:
            return None
        if instruction.opcode in ("copy-start", "slice-start"):
            # Results are (destination, source, context) or ((source), destination, context).
            moved = min(shape.bytes for shape in instruction.shapes if shape.sizes)
            spaces = {shape.space for shape in instruction.shapes if shape.sizes}
            ends = 2 if spaces == {0} else int(0 in spaces)
            return Operation(0, moved * ends, times, True, instruction.name)
        if instruction.opcode.endswith("-start") or instruction.opcode == "async-update":
            return None
        called = instruction.named("calls") if instruction.opcode == "fusion" else None
        inside = list(self._inside(called)) if called else [instruction]
        flops = sum(self._matmul_flops(inner) for inner in inside)
        if any(inner.opcode in COLLECTIVES for inner in inside) and not flops:
            return None
        read = [self._shape_of(instruction, name) for name in instruction.operands]
        traffic = 0.0
        for number, shapes in enumerate(read):
            whole = sum(shape.traffic for shape in shapes)
            traffic += min(whole, self._read(called, number)) if called else whole
        traffic += self._written(self.roots[called]) if called else self._written(instruction)
        return Operation(flops, traffic, times, False, instruction.name)

    @functools.cached_property
    def _homes(self) -> dict[int, str]:
        return {id(op): name for name, body in self.computations.items() for op in body.values()}

    def _shape_of(self, instruction: Instruction, operand: str) -> tuple[Shape, ...]:
        definition = self.computations[self._homes[id(instruction)]].get(operand)
        return definition.shapes if definition else ()

    def _read(self, computation: str, number: int) -> float:
        """Most bytes that a fused computation reads of a parameter; infinite where it may read the whole."""
        body = self.computations[computation]
        parameter = next(op for op in body.values() if op.opcode == "parameter" and op.operands == (str(number),))
        return self._read_by_users(body, parameter.name)

    def _read_by_users(self, body: dict[str, Instruction], name: str) -> float:
        total = 0.0
        for user in (op for op in body.values() if name in op.operands):
            if user.opcode in _PARTIAL_READS and user.operands[0] == name:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode in (*COLLECTIVES, "tuple"):
                continue  # beside the operation, or only handed on
            elif user.opcode == "dynamic-update-slice" and user.operands[0] == name:
                continue  # in place
            elif user.opcode == "bitcast":
                total += self._read_by_users(body, user.name)
            elif user.opcode == "fusion":
                places = [place for place, operand in enumerate(user.operands) if operand == name]
                total += sum(self._read(user.named("calls"), place) for place in places)
            else:
                return math.inf
        return total

    def _written(self, instruction: Instruction) -> float:
        """Bytes of main memory that an instruction writes; of an update in place, the update."""
        body = self.computations[self._homes[id(instruction)]]
        if instruction.opcode in COLLECTIVES or instruction.opcode == "parameter":
            return 0  # of a fusion during which a collective continues
        if instruction.opcode == "dynamic-update-slice":
            update = body[instruction.operands[1]]
            return sum(shape.bytes for shape in update.shapes) if instruction.shapes[0].space == 0 else 0
        if instruction.opcode == "bitcast" and instruction.operands[0] in body:
            return self._written(body[instruction.operands[0]])
        if instruction.opcode == "tuple":
            return sum(self._written(body[name]) for name in instruction.operands)
        if instruction.opcode == "fusion" and len(instruction.shapes) == 1:
            return min(instruction.shapes[0].traffic, self._written(self.roots[instruction.named("calls")]))
        return sum(shape.traffic for shape in instruction.shapes)

    def _matmul_flops(self, instruction: Instruction) -> float:
        if instruction.opcode not in ("dot", "convolution"):
            return 0.0
        left, right = (self._shape_of(instruction, name)[0].sizes for name in instruction.operands[:2])
        sizes = instruction.shapes[0].sizes
        if instruction.opcode == "dot":
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", instruction.attributes)
            return 2.0 * math.prod(sizes) * math.prod(left[int(axis)] for axis in axes[1].split(",") if axis)
        of_left, of_right, of_result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes).groups()
        products = 2.0 * math.prod(sizes[of_result.index(label)] for label in "bf") * right[of_right.index("i")]
        for axis in range(len(of_result) - 2):
            axis_sizes = (left[of_left.index(str(axis))], sizes[of_result.index(str(axis))])
            products *= _window_products(instruction.attributes, axis, *axis_sizes)
        return products


def _window_products(attributes: str, axis: int, length: int, results: int) -> int:
    """How often an element of a window meets one of the input, over all results along a spatial axis of a convolution.

    TPUs hold batch axes as windows in which all but one element meet padding, or the gaps of a dilated input.
    """
    match = re.search(r"window=\{([^}]*)\}", attributes)
    window = dict(word.split("=") for word in match[1].split()) if match else {}
    size, stride, dilation, window_dilation = (
        int(window[name].split("x")[axis]) if name in window else 1
        for name in ("size", "stride", "lhs_dilate", "rhs_dilate")
    )
    before = int(window["pad"].split("x")[axis].split("_")[0]) if "pad" in window else 0
    places = (
        result * stride + element * window_dilation - before for result in range(results) for element in range(size)
    )
    return sum(0 <= place < length * dilation and place % dilation == 0 for place in places)


def _continues(part: Collective, whole: Collective | None) -> bool:
    """Whether one collective is a part of another, of the same channel, that began before."""
    return whole is not None and (part.kind, part.payload, part.group) == (whole.kind, whole.payload, whole.group)


def _called(instruction: Instruction) -> list[str]:
    """The computations that a call or a conditional runs; of the latter all branches."""
    if instruction.opcode == "call":
        return [instruction.named("to_apply")]
    branches = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
    names = branches[1].split(",") if branches else []
    names += [instruction.named(f"{truth}_computation") for truth in ("true", "false")]
    return [name.strip().lstrip("%") for name in names if name]


def _is_slice(body: dict[str, Instruction], root: Instruction) -> bool:
    while root.opcode in ("bitcast", "reshape", "copy") and root.operands[0] in body:
        root = body[root.operands[0]]
    return root.opcode == "dynamic-slice"


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


def _group(attributes: str) -> tuple[int, ...]:
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
