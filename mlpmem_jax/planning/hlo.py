"""Reads a compiled program's FLOPs, memory traffic and collectives from the text of its optimized HLO.

XLA's own cost analysis counts the body of a loop once; here every instruction counts as often as it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

from mlpmem_jax.planning.hlo_text import Instruction, Module, called_by, first_group

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
_PARTIAL_READS = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: one of `COLLECTIVES`.
      payload: bytes of the whole array that is gathered, reduced, or sent.
      group: numbers (positions in the mesh) of the participating devices; for a permutation, one sender and its
        receiver.
      times: how often it runs in one call of the program.
      rings: torus axes that it uses at once, according to the compiler; None if not specified.
      name: name of the instruction.
    """

    kind: str
    payload: float
    group: tuple[int, ...]
    times: float
    rings: int | None
    name: str

    @property
    def sent(self) -> float:
        """Bytes that one device sends (and receives) in one run with the bandwidth-optimal algorithm."""
        if self.kind == "collective-permute":
            return self.payload
        passes = 2 if self.kind == "all-reduce" else 1
        return passes * self.payload * (len(self.group) - 1) / len(self.group)


@dataclasses.dataclass(frozen=True)
class Operation:
    """One instruction on the device: FLOPs of matrix products and bytes of main memory, per run."""

    flops: float
    traffic: float
    times: float
    asynchronous: bool
    name: str


@dataclasses.dataclass(frozen=True)
class Step:
    """One step in a device's execution order.

    Attributes:
      operation: the computation, if any.
      starts: (channel, collective) for each that starts before the operation.
      ends: channels whose collectives must finish after the operation.
      body: steps that run `trips` times.
    """

    operation: Operation | None = None
    starts: tuple[tuple[str, Collective], ...] = ()
    ends: tuple[str, ...] = ()
    body: tuple[Step, ...] = ()
    trips: float = 1.0


@dataclasses.dataclass(frozen=True)
class Program:
    """The steps of one device. `collectives` and `operations` list each once, with how often it runs."""

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
        """FLOPs of matrix products on one device, including recomputation."""
        return sum(operation.flops * operation.times for operation in self.operations)

    @property
    def traffic(self) -> float:
        """Bytes read from and written to main memory on one device."""
        return sum(operation.traffic * operation.times for operation in self.operations)


def parse(text: str) -> Program:
    """Reads the text of an optimized HLO module, whose instructions are in execution order.

    Raises:
      ValueError: the text is not such a module, or the trip count of a loop cannot be read.
    """
    module = Module(text)
    return Program(tuple(_Costs(module).steps(module.entry, 1.0)))


class _Costs:
    """The costs of a module's instructions."""

    def __init__(self, module: Module):
        self._module = module

    def steps(self, name: str, times: float, around: Mapping[str, Collective] | None = None) -> Iterator[Step]:
        """The steps of a computation, including those of its loops, branches and calls, but not of fusions.

        Fusions that only continue a collective of `around` (by channel, those in flight around this computation) do
        not count as separate collectives.
        """
        body = self._module.computations[name]
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
                trips = self._module.trip_count(op)
                yield Step(body=tuple(self.steps(op.named("body"), times * trips, pending)), trips=trips)
                continue
            if op.opcode in ("call", "conditional"):
                for called in called_by(op):
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

    def collectives(self, instruction: Instruction, times: float) -> Iterator[tuple[str, bool, Collective]]:
        """(channel, whether a fusion starts it, collective) for each collective in an instruction."""
        called = instruction.named("calls") if instruction.opcode in ("fusion", "async-start") else None
        inside = list(self._module.inside(called)) if called else [instruction]
        is_start = any("AsyncCollectiveStart" in inner.attributes for inner in inside)
        for inner in inside:
            kind = inner.opcode.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            sent = sum(shape.bytes for name in inner.operands for shape in self._module.shapes_of(inner, name))
            # An asynchronous collective has its operands among its results.
            received = sum(shape.bytes for shape in inner.shapes) - sent * inner.opcode.endswith("-start")
            if kind == "all-reduce" and called and self._is_slice(called):
                kind = "reduce-scatter"  # on TPUs, a fusion of an all-reduce and the slice that is kept
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
                    group=first_group(inner.attributes),
                    times=times,
                    rings=int(rings[1]) if rings else None,
                    name=inner.name,
                ),
            )

    def operation(self, instruction: Instruction, times: float) -> Operation | None:
        """The cost of an instruction itself; None if it costs nothing."""
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
        inside = list(self._module.inside(called)) if called else [instruction]
        flops = sum(self._matmul_flops(inner) for inner in inside)
        if any(inner.opcode in COLLECTIVES for inner in inside) and not flops:
            return None
        read = [self._module.shapes_of(instruction, name) for name in instruction.operands]
        traffic = 0.0
        for number, shapes in enumerate(read):
            whole = sum(shape.traffic for shape in shapes)
            traffic += min(whole, self._read(called, number)) if called else whole
        traffic += self._written(self._module.roots[called]) if called else self._written(instruction)
        return Operation(flops, traffic, times, False, instruction.name)

    def _read(self, computation: str, number: int) -> float:
        """Maximum bytes that a fused computation reads of a parameter; infinite if it may read all of it."""
        body = self._module.computations[computation]
        parameter = next(op for op in body.values() if op.opcode == "parameter" and op.operands == (str(number),))
        return self._read_by_users(body, parameter.name)

    def _read_by_users(self, body: dict[str, Instruction], name: str) -> float:
        total = 0.0
        for user in (op for op in body.values() if name in op.operands):
            if user.opcode in _PARTIAL_READS and user.operands[0] == name:
                total += sum(shape.bytes for shape in user.shapes)
            elif user.opcode in (*COLLECTIVES, "tuple"):
                continue  # not read by the operation, or only passed on
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
        """Bytes of main memory that an instruction writes; for an in-place update, only the update."""
        body = self._module.body_of(instruction)
        if instruction.opcode in COLLECTIVES or instruction.opcode == "parameter":
            return 0  # a fusion during which a collective continues
        if instruction.opcode == "dynamic-update-slice":
            update = body[instruction.operands[1]]
            return sum(shape.bytes for shape in update.shapes) if instruction.shapes[0].space == 0 else 0
        if instruction.opcode == "bitcast" and instruction.operands[0] in body:
            return self._written(body[instruction.operands[0]])
        if instruction.opcode == "tuple":
            return sum(self._written(body[name]) for name in instruction.operands)
        if instruction.opcode == "fusion" and len(instruction.shapes) == 1:
            return min(instruction.shapes[0].traffic, self._written(self._module.roots[instruction.named("calls")]))
        return sum(shape.traffic for shape in instruction.shapes)

    def _is_slice(self, computation: str) -> bool:
        """Whether a computation ends in a slice."""
        body, root = self._module.computations[computation], self._module.roots[computation]
        while root.opcode in ("bitcast", "reshape", "copy") and root.operands[0] in body:
            root = body[root.operands[0]]
        return root.opcode == "dynamic-slice"

    def _matmul_flops(self, instruction: Instruction) -> float:
        if instruction.opcode not in ("dot", "convolution"):
            return 0.0
        left, right = (self._module.shapes_of(instruction, name)[0].sizes for name in instruction.operands[:2])
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
    """How often window elements meet input elements, over all results along a spatial axis of a convolution.

    TPUs represent batch axes as windows in which all but one element meet padding or the gaps of a dilated input.
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
    """Whether a collective is part of an earlier one with the same channel."""
    return whole is not None and (part.kind, part.payload, part.group) == (whole.kind, whole.payload, whole.group)
