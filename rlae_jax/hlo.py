"""Reads compiled programs: the text of XLA's optimised HLO as computations, loops, collectives, copies and cycles.

    module = hlo.parse(compiled.as_text())
    loop = module.loop_carrying(*cache_shapes)
    hlo.collectives(module.inside(loop))        Counter({("all-reduce", ("f32[4,64]",)): 5})

What a program does at every step is in its loop's body and in all that the body calls, which `inside` gives. An
instruction in a fused computation counts like any other.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all", "collective-broadcast")
_COPIES = ("copy", "copy-start")
_SLICES = ("slice", "dynamic-slice", "gather")
_NO_READS = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "optimization-barrier")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^{}]*)\})?")
_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
_NAME = re.compile(r"^(ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r"\s*([a-z][\w\-]*)\(")
_CALLS = re.compile(
    r"\b(?:body|condition|calls|to_apply|true_computation|false_computation|called_computations|branch_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array that an instruction gives, as one device holds it."""

    dtype: str
    dims: tuple[int, ...]
    space: int = 0  # of memory: 0 is the device's main one, on a TPU 1 its vector memory

    @property
    def bits(self) -> int:
        """Of one element."""
        if self.dtype == "pred":
            return 8
        found = re.match(r"[a-z]+(\d+)", self.dtype)
        return int(found.group(1)) if found else 0  # a token

    @property
    def nbytes(self) -> int:
        """Without padding."""
        return -(-math.prod(self.dims) * self.bits // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # several of a tuple
    operands: tuple[str, ...]  # the instructions that it reads
    calls: tuple[str, ...]  # the computations that it runs
    op_name: str  # where it comes from in the traced program
    cycles: int  # the compiler's estimate, where it gives one (TPUs)
    trips: int | None  # of a loop, where the compiler knows them
    body: str | None  # of a loop
    index: int | None = None  # of a parameter

    @property
    def nbytes(self) -> int:
        """Of all its arrays."""
        return sum(shape.nbytes for shape in self.shapes)


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str
    aliases: int  # outputs that are written over an argument

    def reach(self, *names: str) -> list[str]:
        """The computations of these names and all that they call."""
        found: dict[str, None] = {}
        todo = [name for name in names if name in self.computations]
        while todo:
            name = todo.pop()
            if name not in found:
                found[name] = None
                called = [c for instruction in self.computations[name] for c in instruction.calls]
                todo += [c for c in called if c in self.computations]
        return list(found)

    def loops(self) -> Iterator[Instruction]:
        """Every loop, those inside others after them."""
        for name in self._outside_in:
            yield from (i for i in self.computations[name] if i.opcode == "while")

    @functools.cached_property
    def _outside_in(self) -> list[str]:
        """The entry, what it calls, what that calls, ..."""
        found, level = dict.fromkeys([self.entry]), [self.entry]
        while level:
            called = [c for name in level for i in self.computations[name] for c in i.calls]
            level = [c for c in dict.fromkeys(called) if c in self.computations and c not in found]
            found |= dict.fromkeys(level)
        return list(found)

    def inside(self, loop: Instruction) -> list[Instruction]:
        """What a loop's body runs, and all that it calls, loops and branches included."""
        assert loop.body is not None
        return [i for name in self.reach(loop.body) for i in self.computations[name]]

    def outside_loops(self) -> list[Instruction]:
        """What runs once."""
        bodies = {name for loop in self.loops() for name in self.reach(*loop.calls)}
        return [i for name in self.reach(self.entry) if name not in bodies for i in self.computations[name]]

    def loop_carrying(self, *shapes: Shape) -> Instruction:
        """The outermost loop whose carry has arrays of all these shapes, such as the decoding loop by its caches.

        Raises:
          ValueError: there is none.
        """
        wanted = {(shape.dtype, shape.dims) for shape in shapes}
        for loop in self.loops():
            if wanted <= {(shape.dtype, shape.dims) for shape in loop.shapes}:
                return loop
        raise ValueError(f"no loop carries {', '.join(map(str, shapes))}")

    @functools.cached_property
    def _by_name(self) -> dict[str, Instruction]:
        return {i.name: i for body in self.computations.values() for i in body}

    @functools.cached_property
    def _fused(self) -> set[str]:
        """The instructions of fused computations: what they give is not kept."""
        called = {name for body in self.computations.values() for i in body if i.opcode == "fusion" for name in i.calls}
        return {i.name for name in called if name in self.computations for i in self.computations[name]}

    def _is_copy(self, i: Instruction) -> bool:
        """A copy by itself, or a fusion that ends in one."""
        if i.name in self._fused:
            return False
        if i.opcode != "fusion":
            return i.opcode in _COPIES
        return any(self.computations[name][-1].opcode == "copy" for name in i.calls if name in self.computations)

    def copies(self, instructions: Iterable[Instruction], at_least: int) -> list[Instruction]:
        """Copies of arrays of at least so many bytes from place to place in the main memory.

        What goes to a vector memory and back is how a TPU reads and writes, and a copy within a fusion is how it takes
        its operand.
        """
        found = []
        for i in instructions:
            if not i.shapes or i.shapes[0].nbytes < at_least or not self._is_copy(i):
                continue
            sources = [self._by_name[name] for name in i.operands if name in self._by_name]
            places = [i.shapes[0], *(shape for source in sources for shape in source.shapes)]
            if all(shape.space == 0 for shape in places if shape.nbytes >= at_least):
                found.append(i)
        return found

    def bytes_read(self, name: str, cache: int) -> int:
        """What one run of a computation reads of arrays of more than `cache` bytes: all others are as good as in a
        processor's cache. Of an array of which a slice is taken the slice counts; of a branch the one that reads most;
        a loop counts as often as it runs, once where the compiler does not know."""
        total = 0
        for i in self.computations[name]:
            if i.opcode == "while" and i.body is not None:
                total += (i.trips or 1) * self.bytes_read(i.body, cache)
            elif i.opcode == "conditional":
                total += max(self.bytes_read(c, cache) for c in i.calls)
            elif i.opcode == "call":
                total += sum(self.bytes_read(c, cache) for c in i.calls)
            elif i.opcode not in _NO_READS:
                total += sum(self._read_of(i, k) for k in range(len(i.operands)) if self._operand(i, k) > cache)
        return total

    def _operand(self, i: Instruction, k: int) -> int:
        """Its bytes."""
        source = self._by_name.get(i.operands[k])
        return 0 if source is None else source.nbytes

    def _read_of(self, i: Instruction, k: int) -> int:
        """The bytes that an instruction reads of its k-th operand."""
        if i.opcode in _SLICES and k == 0:
            return i.nbytes
        if i.opcode == "dynamic-update-slice" and k == 0:
            return 0  # written in place
        if i.opcode != "fusion":
            return self._operand(i, k)
        inside = self.computations[i.calls[0]]
        names = {p.name for p in inside if p.index == k}
        total = 0
        for user in inside:
            for n, operand in enumerate(user.operands):
                if operand in names and user.opcode == "bitcast":
                    names.add(user.name)
                elif operand in names:
                    total += self._read_of(user, n)
        return min(total, self._operand(i, k))

    def cycles(self, name: str) -> int:
        """The estimated cycles of one run of a computation: of a branch the longest, of a loop inside it all trips
        where the compiler knows them, else one."""
        total = 0
        for i in self.computations[name]:
            if i.opcode == "while" and i.body is not None:
                total += (i.trips or 1) * self.cycles(i.body)
            elif i.opcode == "conditional":
                total += max(self.cycles(c) for c in i.calls)
            elif i.opcode == "call":
                total += sum(self.cycles(c) for c in i.calls)
            else:
                total += i.cycles
        return total


def parse(text: str) -> Module:
    """A compiled program from the text of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: text without an entry computation.
    """
    computations: dict[str, list[Instruction]] = {}
    entry, current = None, None
    aliases = 0
    for line in text.splitlines():
        if line.startswith("HloModule"):
            aliases = _count_aliases(line)
        elif not line[:1].isspace() and (header := _HEADER.match(line)):
            current = header.group(2)
            computations[current] = []
            entry = current if header.group(1) else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (instruction := _instruction(line.strip())):
            computations[current].append(instruction)
    if entry is None:
        raise ValueError("no entry computation: this is not the text of a compiled program")
    return Module({name: tuple(body) for name, body in computations.items()}, entry, aliases)


def _count_aliases(header: str) -> int:
    """Outputs in `input_output_alias={ {0}: (1, {}, may-alias), ... }`."""
    _, found, rest = header.partition("input_output_alias=")
    return len(re.findall(r"\}:\s*\(", rest[: _closing(rest, "{", "}")])) if found else 0


def _closing(text: str, opens: str, closes: str) -> int:
    """Where the bracket with which the text begins is closed, just behind it."""
    depth = 0
    for i, character in enumerate(text):
        depth += (character == opens) - (character == closes)
        if not depth:
            return i + 1
    return len(text)


def _instruction(line: str) -> Instruction | None:
    start = _NAME.match(line)
    if not start:
        return None
    rest = line[start.end() :]
    # Layouts hold brackets too, T(8,128), so that a tuple ends where its own is closed.
    end = _closing(rest, "(", ")") if rest.startswith("(") else rest.find(" ")
    shapes, rest = rest[:end], rest[end:]
    opcode = _OPCODE.match(rest)
    if not opcode:
        return None
    inside = _closing(rest[opcode.end() - 1 :], "(", ")") + opcode.end() - 1
    attributes = rest[inside:]
    calls = [name.strip().lstrip("%") for c in _CALLS.findall(attributes) for name in c.strip("{}").split(",")]
    return Instruction(
        name=start.group(2),
        opcode=opcode.group(1),
        shapes=tuple(_shapes(shapes)),
        operands=tuple(re.findall(r"%([\w.\-]+)", rest[opcode.end() : inside])),
        calls=tuple(name for name in calls if name),
        op_name=_first(r'op_name="([^"]*)"', attributes) or "",
        cycles=int(_first(r'"estimated_cycles":"(\d+)"', attributes) or 0),
        trips=int(_first(r'"known_trip_count":\{"n":"(\d+)"', attributes) or 0) or None,
        body=_first(r"\bbody=%?([\w.\-]+)", attributes),
        index=int(rest[opcode.end() : inside - 1]) if opcode.group(1) == "parameter" else None,
    )


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text)
    return found.group(1) if found else None


def _shapes(text: str) -> Iterator[Shape]:
    for dtype, dims, layout in _ARRAY.findall(text):
        sizes = tuple(int(size.lstrip("<=")) for size in dims.split(",") if size)
        yield Shape(dtype, sizes, int(_first(r"S\((\d+)\)", layout) or 0))


def collectives(instructions: Iterable[Instruction]) -> collections.Counter[tuple[str, tuple[str, ...]]]:
    """How often (kind, shapes) comes: exchanges between devices, an asynchronous one counted where it starts."""
    counted: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    for i in instructions:
        kind = i.opcode.removesuffix("-start")
        if kind in COLLECTIVES:
            counted[kind, tuple(map(str, i.shapes))] += 1
    return counted


def collective_bytes(instructions: Iterable[Instruction]) -> int:
    """The bytes of the largest array of any exchange between devices."""
    sizes = [shape.nbytes for i in instructions if i.opcode.removesuffix("-start") in COLLECTIVES for shape in i.shapes]
    return max(sizes, default=0)


def largest_float(module: Module) -> int:
    """How many elements the largest array of floating-point numbers has that a program writes to memory: what stays
    inside a fusion, and arguments, do not count."""
    bodies = [module.entry, *(loop.body for loop in module.loops() if loop.body is not None)]
    written = [
        i
        for name in bodies
        for i in module.computations[name]
        if i.opcode not in ("parameter", "get-tuple-element", "tuple")
    ]
    floats = [shape for i in written for shape in i.shapes if re.match(r"b?f\d+$", shape.dtype)]
    return max((math.prod(shape.dims) for shape in floats), default=0)
