"""The pipeline's result as a table for the terminal: a row per stage, a table per task, every column aligned; and a cell of a table over seeds.

The reward model has no responses of its own, so its row spans the columns with its accuracy and what length alone would reach.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from rlhf_jax.report.results import STAGES, TITLES

_HEADERS = ("gold_greedy", "gold_sample", "win_vs_sft", "95% CI", "seq_kl", "seconds")
_GAP = "  "


def terminal_table(results: dict[str, Any]) -> str:
    """The tables of all tasks, separated by blank lines.

    Args:
      results: a valid results document.

    Returns:
      text without a trailing newline; lines of one table have the same width.
    """
    return "\n\n".join(task_table(task, stages) for task, stages in results["tasks"].items())


def spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    """mean ± standard deviation of repeated measurements.

    Args:
      values: one or more; of one the deviation is 0.
      digits: after the point.
      sign: "+" writes that of a positive mean too.
    """
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{sign}.{digits}f} ± {deviation:.{digits}f}"


def task_table(task: str, stages: dict[str, Any]) -> str:
    """One task's table: the chosen checkpoint of each stage and, indented under it, the final one where it is reported.

    Args:
      task: its name, the table's title.
      stages: `tasks.<task>` of a results document.
    """
    rows: list[tuple[str, list[str]]] = []
    for stage in STAGES:
        if stage not in stages:
            continue
        values = stages[stage]
        if stage == "rm":
            rows.append((TITLES[stage], [_reward_model(values), _seconds(values)]))
            continue
        rows.append((TITLES[stage], _cells(values)))
        if "final" in values:
            rows.append(("  final", _cells(values["final"])))
    return _render(f"task: {task}", rows)


def _cells(values: dict[str, Any]) -> list[str]:
    interval = values["win_ci95"]
    return [
        f"{values['gold_greedy']:.3f}",
        f"{values['gold_sample']:.3f}",
        "–" if values["win_vs_sft"] is None else f"{values['win_vs_sft']:.3f}",
        "–" if interval is None else f"[{interval[0]:.3f}, {interval[1]:.3f}]",
        f"{values['seq_kl']:.2f}",
        _seconds(values),
    ]


def _reward_model(values: dict[str, Any]) -> str:
    return f"accuracy {values['accuracy']:.3f}, length alone {values['length_baseline']:.3f}"


def _seconds(values: dict[str, Any]) -> str:
    return f"{values['seconds']:.1f}" if "seconds" in values else ""


def _render(title: str, rows: list[tuple[str, list[str]]]) -> str:
    """Names on the left, numbers on the right; a row of two cells lets its first one span all columns but the last."""
    whole = [cells for _, cells in rows if len(cells) == len(_HEADERS)]
    names = max(len(title), *(len(name) for name, _ in rows))
    widths = [max(len(header), *(len(cells[i]) for cells in whole), 0) for i, header in enumerate(_HEADERS)]
    widths[-1] = max(widths[-1], *(len(cells[-1]) for _, cells in rows))
    span = sum(widths[:-1]) + len(_GAP) * (len(widths) - 2)
    wide = max((len(cells[0]) for _, cells in rows if len(cells) == 2), default=0)
    widths[0] += max(0, wide - span)
    span = max(span, wide)

    def line(name: str, cells: list[str]) -> str:
        if len(cells) == 2:
            return _GAP.join([name.ljust(names), cells[0].rjust(span), cells[1].rjust(widths[-1])])
        return _GAP.join([name.ljust(names), *(cell.rjust(width) for cell, width in zip(cells, widths))])

    header = line(title, list(_HEADERS))
    return "\n".join([header, "─" * len(header), *(line(name, cells) for name, cells in rows)])
