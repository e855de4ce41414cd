"""What a compiled program's text says: its collectives, with their bytes and the mesh axes over which they speak, and what it moves through the
chip's memory, loops multiplied out.

The compiler's `cost_analysis` counts the body of a loop once. Here a computation counts as often as it is called, and a loop's body as often as its
condition lets it run: `index < constant`. A loop whose end is data (a sampler that stops when every row has ended) counts up to the same constant,
its longest run.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4,
         "u32": 4, "f64": 8, "s64": 8, "u64": 8}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_SHAPE = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|true_computation|false_computation|called_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%?([\w.\-]+), body=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program."""

    kind: str  # of KINDS
    bytes: int  # on a device: of its larger side, the gathered result or what is reduced
    axes: tuple[str, ...]  # mesh axes over which it speaks
    times: int  # how often it runs
    source: str  # where it comes from in the traced program
    group: int  # devices that speak with each other

    @property
    def sent(self) -> float:
        """Bytes that each device sends in all runs, by the bandwidth-optimal ring: (n − 1) / n of the whole, twice that for an all-reduce."""
        if self.kind == "collective-permute":
            return float(self.bytes * self.times)
        return self.bytes * self.times * (2 if self.kind == "all-reduce" else 1) * (self.group - 1) / self.group


def collectives(text: str, mesh: Mapping[str, int]) -> list[Collective]:
    """A compiled program's collectives.

    Args:
      text: `compiled.as_text()`.
      mesh: devices along each axis, in the mesh's order.
    """
    bodies = _computations(text)
    times = _times(bodies)
    found = []
    for name, lines in bodies.items():
        for line in lines if times.get(name) else ():
            for kind in KINDS:
                at = line.find(f" {kind}(")
                at = at if at >= 0 else line.find(f" {kind}-start(")
                if at < 0:
                    continue
                groups = _groups(line, math.prod(mesh.values()))
                axes = _axes(groups, mesh)
                if not axes:
                    continue
                source = re.search(r'op_name="([^"]*)"', line)
                size = _operand_bytes(line, at, kind, groups)
                # A reduction whose parts each device keeps: an all-reduce within a fusion of this name (TPU).
                shown = "reduce-scatter" if kind == "all-reduce" and "all-reduce-scatter" in name else kind
                found.append(Collective(shown, size, axes, times[name], source[1] if source else "", len(groups[0])))
    return found


def summed(found: Sequence[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, int, float]]:
    """(kind, axes) → (runs, bytes of all runs, bytes that a device sends).

    Args:
      found: from `collectives`.
    """
    total: dict[tuple[str, tuple[str, ...]], tuple[int, int, float]] = {}
    for one in found:
        runs, size, sent = total.get((one.kind, one.axes), (0, 0, 0.0))
        total[one.kind, one.axes] = runs + one.times, size + one.bytes * one.times, sent + one.sent
    return dict(sorted(total.items(), key=lambda item: -item[1][2]))


_FREE = ("tuple", "get-tuple-element", "parameter", "bitcast", "constant", "while", "conditional", "call", "after-all", "partition-id", "iota")
_NAMES = re.compile(r"%([\w.\-]+)")


def traffic(text: str) -> float:
    """Bytes that a device reads from and writes to its memory: operands and results of every scheduled operation, those kept in the chip's own
    scratch (memory space S(1)) apart. Of an operand that a fusion only slices, the slice counts; of one that it only updates, the update.

    Args:
      text: `compiled.as_text()`.
    """
    bodies = _computations(text)
    times, fused = _times(bodies), set(re.findall(r"fusion\(.*?calls=%?([\w.\-]+)", text))
    total = 0.0
    for name, lines in bodies.items():
        if not times.get(name) or name in fused:
            continue
        shapes = {match[1]: match[2] for line in lines if (match := _INSTRUCTION.match(line))}
        total += times[name] * sum(_moved(whole, shapes, bodies) for whole in shapes.values())
    return total


def _moved(instruction: str, shapes: Mapping[str, str], bodies: Mapping[str, Sequence[str]]) -> float:
    head, _, rest = _split(instruction)
    if head in _FREE or head.endswith("-done"):
        return 0.0
    operands = [shapes[name] for name in _NAMES.findall(rest[: rest.find("), ") if "), " in rest else len(rest)]) if name in shapes]
    sizes = [_memory(operand) for operand in operands]
    result = _memory(instruction)
    called = re.search(r"calls=%?([\w.\-]+)", rest)
    if head == "fusion" and called and called[1] in bodies:
        sizes, result = _fused(bodies[called[1]], sizes, result)
    elif head == "dynamic-slice":
        sizes = [result]
    elif head == "dynamic-update-slice":
        sizes, result = sizes[1:2], sizes[1] if len(sizes) > 1 else result
    return sum(sizes) + result


def _split(instruction: str) -> tuple[str, str, str]:
    """(operation, result shapes, the rest from the operands on)."""
    match = re.search(r"(?:^|[\s)}\]])([a-z][a-z\-]*)\(", instruction)
    return (match[1], instruction[: match.start()], instruction[match.end() :]) if match else ("", instruction, "")


def _memory(instruction: str) -> float:
    """Bytes of a result that lies in the chip's main memory."""
    _, shapes, _ = _split(instruction)
    return sum(_size(kind, sizes) for kind, sizes, layout in re.findall(rf"{_SHAPE.pattern}(\{{[^}}]*\}})?", shapes) if "S(" not in layout)


def _fused(lines: Sequence[str], sizes: list[float], result: float) -> tuple[list[float], float]:
    """What a fusion really reads of its operands and writes of its result."""
    shapes = {match[1]: match[2] for line in lines if (match := _INSTRUCTION.match(line))}
    order = {int(match[1]): name for name, text in shapes.items() if (match := re.search(r"parameter\((\d+)\)", text))}
    for number, name in order.items():
        if number >= len(sizes):
            continue
        uses = [text for text in shapes.values() if re.search(rf"%{re.escape(name)}[,)]", text)]
        heads = [_split(text)[0] for text in uses]
        if uses and all(head == "dynamic-slice" for head in heads):
            sizes[number] = min(sizes[number], sum(_memory(text) for text in uses))
        elif uses and all(head == "dynamic-update-slice" for head in heads):
            updates = [shapes[names[1]] for text in uses if len(names := _NAMES.findall(_split(text)[2])) > 1 and names[1] in shapes]
            written = sum(_memory(text) for text in updates)
            sizes[number], result = 0.0, min(result, written) if written else result
    return sizes, result


def _computations(text: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    lines: list[str] | None = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = found.setdefault("ENTRY" if match[1] else match[2], [])
        elif lines is not None:  # up to the next head: a kernel's own text within an instruction has lines of braces too
            lines.append(line)
    return found


def _times(bodies: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """How often each computation runs, callers before the called."""
    edges: dict[str, list[tuple[str, int]]] = {name: list(_calls(lines, bodies)) for name, lines in bodies.items()}
    times: dict[str, int] = {}

    def visit(name: str, count: int) -> None:
        times[name] = times.get(name, 0) + count
        for called, repeats in edges.get(name, ()):
            visit(called, count * repeats)

    visit("ENTRY", 1)
    return times


def _calls(lines: Sequence[str], bodies: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, int]]:
    for line in lines:
        if match := _LOOP.search(line):
            yield match[2], _trips(bodies.get(match[1], ()), bodies)
        for name in _CALLED.findall(line):
            yield name, 1
        if match := _BRANCHES.search(line):
            yield from ((name.strip().lstrip("%"), 1) for name in match[1].split(","))


def _trips(condition: Sequence[str], bodies: Mapping[str, Sequence[str]]) -> int:
    """The constant that a loop's index stays below; the largest where there are several; 1 where there is none."""
    lines = [*condition, *itertools.chain.from_iterable(bodies.get(name, ()) for line in condition for name in _CALLED.findall(line))]
    limits = [int(n) for line in lines for n in re.findall(r" [su]32\[\]\S* constant\((\d+)\)", line)]
    return max(limits, default=1) or 1


def _operand_bytes(line: str, at: int, kind: str, groups: np.ndarray) -> int:
    """Bytes of the larger side. The result's shapes stand before the name; an asynchronous start's
    are a tuple."""
    match = _INSTRUCTION.match(line)
    shapes = [_size(*shape) for shape in _SHAPE.findall(line[match.start(2) if match else 0 : at])]
    if line[at:].startswith(f" {kind}-start(") and kind in ("all-gather", "collective-permute"):
        shapes = [max(shapes)]  # of a tuple with its operand and what it waits by
    total = sum(shapes)
    return int(total * len(groups[0]) if kind == "reduce-scatter" else total)


def _size(kind: str, dimensions: str) -> float:
    return BYTES.get(kind, 4) * math.prod(int(n) for n in dimensions.split(",") if n)


def _groups(line: str, devices: int) -> np.ndarray:
    """[groups, members] of device numbers, from whichever way the text writes them."""
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? ?\{([^}]*)\}", line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", match[1])}
        ids = _iota(match[2], devices) if match[2] else np.arange(devices)
        names, chosen = list(sizes), re.findall(r"'(\w+)'", match[3])
        inside = [names.index(name) for name in chosen]
        outside = [i for i in range(len(names)) if i not in inside]
        return ids.reshape(tuple(sizes.values())).transpose(outside + inside).reshape(-1, math.prod(sizes[name] for name in chosen))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _iota(match[2], devices).reshape([int(n) for n in match[1].split(",")])
    if match := re.search(r"(?:replica_groups|source_target_pairs)=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}", line):
        rows = [[int(n) for n in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", match[1])]
        return np.array(rows)
    return np.arange(devices).reshape(1, -1)


def _iota(text: str, devices: int) -> np.ndarray:
    """`[4,16]T(1,0)`: 0, 1, … in that shape, transposed."""
    shape = [int(n) for n in re.findall(r"\d+", text[: text.index("]")])]
    order = re.search(r"T\(([\d,]+)\)", text)
    ids = np.arange(math.prod(shape)).reshape(shape)
    return (ids.transpose([int(n) for n in order[1].split(",")]) if order else ids).reshape(-1)


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    where = np.stack(np.unravel_index(groups, tuple(mesh.values())))  # [axes, groups, members]
    differs = (where != where[:, :, :1]).any((1, 2))
    return tuple(name for name, differ in zip(mesh, differs, strict=True) if differ)
