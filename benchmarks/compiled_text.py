"""Reading what XLA's TPU compiler leaves in a compiled program: cycles, tiles, traffic between chips, copies.

The text of a scheduled program names for every array its layout in memory, `f32[77,10,8]{0,1,2:T(8,128)}`: which axis
is the innermost, and the tile that the innermost axes are padded to.  For nearly every operation it names the
compiler's own estimate of its cycles.  A loop's body stands there once; here it counts as often as the loop turns.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
BYTES |= {"s64": 8, "u64": 8}
WRITERS = ("fusion", "copy", "convert", "reduce", "broadcast", "convolution", "dot", "slice")
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\](?:\{([\d,]*)(?::T\(([\d,]+)\))?[^}]*\})?")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%(\S+) = (\(.*?\)|\S+) ([\w-]+)\((.*)$")
_COMPUTATION = re.compile(r"^(ENTRY )?%?(\S+) \(.*\{$")


class Shape(NamedTuple):
    """An array in memory: its own bytes, and those of the tiles that hold it."""

    logical: int
    padded: int


class Instruction(NamedTuple):
    """One line of a computation; `cycles` is None where the compiler gives no estimate."""

    name: str
    shape: str
    operation: str
    rest: str
    root: bool

    @property
    def cycles(self) -> int | None:
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else None

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.-]+)", self.rest.partition(")")[0])

    @property
    def in_place(self) -> bool:
        """Whether what it gives lies where one of its operands was."""
        lists = re.search(r'"aliasing_operands":\{"lists":\[(.*?)\]\}\}', self.rest)
        indices = re.findall(r'"(\d+)"', lists[1]) if lists else []
        return any(int(i) >= len(self.operands) for i in indices)

    def calls(self, *keys: str) -> list[str]:
        """Computations that it names under some keys, such as `body`."""
        return [name for key in keys for name in re.findall(rf"\b{key}=%?([\w.-]+)", self.rest)]


class Summary(NamedTuple):
    """What a compiled program says of itself, loops counted as often as they turn.

    Attributes:
      cycles: the compiler's estimates, one operation after the other.
      unestimated: operations on arrays for which it gives none: gathers, sorts, and the like, by the kind of line.
      written, written_padded: bytes of the arrays that operations write, themselves and in tiles; not those that are
        changed in place.
      arguments, arguments_padded: the same for the arguments of the program.
      collectives: kind and bytes of each exchange between chips.
    """

    cycles: int
    unestimated: dict[str, int]
    written: int
    written_padded: int
    arguments: int
    arguments_padded: int
    collectives: list[tuple[str, int]]


def arrays(shape: str) -> Iterator[Shape]:
    """The arrays of a shape as it is printed; those of a tuple one after the other."""
    for kind, dims, order, tile in _SHAPE.findall(shape):
        if kind not in BYTES:
            continue
        sizes = [int(n) for n in dims.split(",") if n]
        minor = [sizes[int(axis)] for axis in order.split(",") if axis]
        tiles = [int(n) for n in tile.split(",") if n][::-1]
        if len(tiles) > len(minor):  # a scalar takes a tile
            minor += [1] * (len(tiles) - len(minor))
        padded = [-(-n // t) * t for n, t in zip(minor, tiles, strict=False)] + minor[len(tiles) :]
        logical = math.prod(sizes) * BYTES[kind]
        yield Shape(logical, math.prod(padded) * BYTES[kind] if order or tile else logical)


def numbers_of(dims: str) -> int:
    """How many numbers an array of the dimensions `77,10,8` holds."""
    return math.prod(int(n) for n in dims.split(",") if n)


def computations(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """All computations by name, and the name of the one that is run."""
    found: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if begins := _COMPUTATION.match(line):
            current = found.setdefault(begins[2], [])
            entry = begins[2] if begins[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (made := _INSTRUCTION.match(line)):
            root, name, shape, operation, rest = made.groups()
            current.append(Instruction(name, shape, operation, rest, bool(root)))
    return found, entry


def turns(loop: Instruction, caller: list[Instruction], condition: list[Instruction]) -> int:
    """How often a loop turns that counts from 0 to a constant; 1 for one whose end the program does not hold."""
    named = {line.name: line for line in condition}
    for line in condition:
        if line.root and line.operation in ("compare", "fusion"):
            for operand in line.operands[::-1]:
                bound = named.get(operand)
                while bound is not None and bound.operation in ("copy", "bitcast"):
                    bound = named.get(bound.operands[0])
                if bound is not None and bound.operation == "get-tuple-element":
                    bound = _carried(bound, loop, caller)
                if bound is not None and bound.operation == "constant" and bound.shape.startswith("s32[]"):
                    count = int(bound.rest.partition(")")[0])
                    if count > 0:
                        return count
    return 1


def _carried(element: Instruction, loop: Instruction, caller: list[Instruction]) -> Instruction | None:
    """What a loop starts with in the place of its tuple that `element` reads, if the loop leaves it as it is."""
    named = {line.name: line for line in caller}
    index = re.search(r"index=(\d+)", element.rest)
    start = named.get(loop.operands[0])
    if index is None or start is None or start.operation != "tuple":
        return None
    value = named.get(start.operands[int(index[1])])
    while value is not None and value.operation in ("copy", "bitcast"):
        value = named.get(value.operands[0])
    return value


def summary(text: str) -> Summary:
    """What the text of a compiled program says; see `Summary`."""
    found, entry = computations(text)
    cycles = written = padded = 0
    unestimated: dict[str, int] = {}
    collectives: list[tuple[str, int]] = []

    def visit(name: str, times: int) -> None:
        nonlocal cycles, written, padded
        lines = found[name]
        for line in lines:
            if line.operation == "while":
                (condition,), (body,) = line.calls("condition"), line.calls("body")
                visit(body, times * turns(line, lines, found[condition]))
                continue
            if line.operation in ("call", "conditional"):
                for called in line.calls("to_apply", "true_computation", "false_computation"):
                    visit(called, times)
                continue
            kind = line.operation.removesuffix("-start")
            if kind in COLLECTIVES:
                moved = [a.logical for a in arrays(line.shape)]
                collectives.append((kind, moved[-1] if line.operation.endswith("-start") else sum(moved)))
            if line.cycles is not None:
                cycles += times * line.cycles
            elif line.operation == "fusion" and "kind=kCustom" in line.rest:
                name_of = re.sub(r"[.\d]+$", "", line.name)
                unestimated[name_of] = unestimated.get(name_of, 0) + times
            if line.operation in WRITERS and not line.in_place:
                for array in arrays(line.shape):
                    written += times * array.logical
                    padded += times * array.padded

    visit(entry, 1)
    given = [a for line in found[entry] if line.operation == "parameter" for a in arrays(line.shape)]
    return Summary(
        cycles,
        unestimated,
        written,
        padded,
        sum(a.logical for a in given),
        sum(a.padded for a in given),
        collectives,
    )
