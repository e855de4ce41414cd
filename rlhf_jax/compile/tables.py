"""What was measured, for the terminal and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_jax.compile.measure import BOUNDS, Measured, breakdown, total
from rlhf_jax.report import curves

GIB, GB = 2**30, 1e9
_LARGEST = 8  # rows of a breakdown
LEGEND = """A chip's share, GiB. Indented: phases of the programs above them. From the compiler: args, temp, peak (with what lies beside them) and the
schedule that HBM and sent bytes are summed over, loops multiplied out. Ours: TFLOP (2·M·N·K of the products in the traced program, what remat repeats
included) and the bounds, each at the chip's published peak; * is the longest. A batch takes at least the sum over the programs that run."""


def table(found: Sequence[Measured]) -> str:
    """A row per program: memory of a chip, verdict, operations and the bound of its time."""
    bounds = [f"{name} ms" for name in BOUNDS]
    head = ("program", "args", "temp", "beside", "peak", "of GiB", "verdict", "TFLOP", "HBM GB", "sent GB", *bounds, "compile s")
    rows = [head]
    for one in found:
        name = one.name if one.runs else f"  {one.name}" + (f" ×{one.times}" if one.times > 1 else "")
        memory = [f"{size / GIB:.2f}" for size in (one.args_bytes, one.temp_bytes, one.beside_bytes, one.peak_bytes, one.hbm_bytes)]
        margin = (one.hbm_bytes - one.peak_bytes) / GIB
        verdict = f"fits, {margin:.2f} free" if one.fits else f"OVER by {-margin:.2f}"
        sent = sum(size for _, _, size in one.collectives.values())
        times = [f"{one.seconds[name] * 1e3:.2f}" + ("*" if one.bound[0] == name else "") for name in BOUNDS] if one.seconds else ["–"] * len(BOUNDS)
        rows.append((name, *memory, verdict, f"{one.flops / 1e12:.3g}", f"{one.traffic_bytes / GB:.3g}", f"{sent / GB:.3g}", *times,
                     f"{one.compile_seconds:.1f}"))
    return aligned(rows)


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Columns under each other, the first to the left.

    Args:
      rows: of one length, the head first.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))).rstrip()
                     for row in rows)


def collectives(found: Sequence[Measured]) -> str:
    """A row per kind of collective and mesh axes of each program."""
    rows = [("program", "collective", "mesh axes", "runs", "GiB in all", "GiB a chip sends")]
    for one in found:
        for (kind, axes), (runs, size, sent) in one.collectives.items():
            rows.append((one.name, kind, " × ".join(axes), str(runs), f"{size / GIB:.3f}", f"{sent / GIB:.3f}"))
    return aligned(rows) if len(rows) > 1 else "no collectives"


def refusal(one: Measured) -> str:
    """The compiler's own largest allocations of a program that does not fit."""
    rows = [("GiB", "shape", "from")]
    rows += [(f"{size / GIB:.2f}", shape, source[-90:]) for size, shape, source in breakdown(one.refused)[:_LARGEST]]
    return aligned(rows) if len(rows) > 1 else " ".join(one.refused.split())[:400]


def verdict(found: Sequence[Measured]) -> str:
    """The whole run in one sentence."""
    whole = total(found)
    margin = whole["margin_bytes"] / GIB
    said = f"fits, {margin:.2f} GiB of a chip free" if whole["fits"] else f"does not fit: {-margin:.2f} GiB too much on a chip"
    bound = "" if whole["lower_bound_seconds"] is None else f"; a batch takes at least {whole['lower_bound_seconds']:.3g} s"
    return f"{said} (the most is {whole['worst']}'s {whole['peak_bytes'] / GIB:.2f} GiB){bound}"


def picture(found: Sequence[Measured], title: str) -> str:
    """Memory of a chip by part, against its HBM, and the bounds of each program's time: a data URI.

    Args:
      found: of all programs.
      title: of the whole.
    """
    memory = {one.name: {"beside": one.beside_bytes / GIB, "arguments": one.args_bytes / GIB, "results": one.output_bytes / GIB,
                         "temporaries": one.temp_bytes / GIB} for one in found}
    times: dict[str, Any] = {one.name: {name: one.seconds[name] * one.times * 1e3 for name in BOUNDS} for one in found if one.seconds}
    limit = found[0].hbm_bytes / GIB
    return curves.stacked_bars(memory, times, limit=limit, title=title, left="GiB of a chip", right="ms of a batch, at least")
