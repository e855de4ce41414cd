"""The report's pictures, drawn with matplotlib (no display, no pyplot state) and returned as SVG `data:` URIs.

One style and one colour per stage throughout. A picture is an image with its own name space (not inline markup), so that many of them can
stand on one page, and it needs no font or script of the page. Nothing is drawn that is not in the results or in a run's metrics.jsonl.
"""

from __future__ import annotations

import base64
import contextlib
import io
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle

from rlhf_jax.files import write_whole
from rlhf_jax.report.results import POLICY_STAGES, STAGES, TITLES
from rlhf_jax.runlog import records

COLOURS = {"sft": "#8792A5", "rm": "#8E63CE", "dpo": "#2F6FDE", "ppo": "#E07B39", "grpo": "#16936F", "grpo_gold": "#B8921C"}
_SERIES = ("#E07B39", "#16936F", "#2F6FDE", "#8E63CE", "#B8921C", "#C2456B")  # of what is no stage

# Which metrics tell the story of a stage, by pattern, best first; the names are the field's (STYLE: `objective/kl`, `reward/margin`).
_STORY = {
    "sft": (r"^loss/", r"^eval/loss/", r"^optimizer/grad_norm", r"^optimizer/lr"),
    "rm": (r"^loss/", r"^eval/reward/accuracy", r"^reward/accuracy", r"^reward/margin", r"^optimizer/grad_norm"),
    "dpo": (r"^loss/", r"^reward/margin", r"^logps/chosen", r"^eval/reward/accuracy", r"^reward/accuracy"),
}
_ONLINE = (r"^objective/score$", r"^objective/kl$", r"^objective/entropy", r"^eval/objective/score", r"^loss/", r"^rollout/length")
_PANELS = 4
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelcolor": "#4A5262",
    "axes.edgecolor": "#C6CCD6",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E9ECF1",
    "grid.linewidth": 0.8,
    "xtick.color": "#6A7385",
    "ytick.color": "#6A7385",
    "text.color": "#1E2633",
    "legend.frameon": False,
    "svg.hashsalt": "rlhf_jax",
    "figure.facecolor": "white",
}


def gold_bars(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Mean gold of every stage, greedy beside sampled, with intervals where the results hold them; a panel per task."""
    with _figure(len(tasks), height=3.1) as (figure, axes):
        for index, (axis, (task, stages)) in enumerate(zip(axes, tasks.items())):
            present = [stage for stage in POLICY_STAGES if stage in stages]
            for offset, name, alpha in ((-0.19, "gold_greedy", 1.0), (0.19, "gold_sample", 0.45)):
                for x, stage in enumerate(present):
                    value = stages[stage][name]
                    axis.bar(x + offset, value, 0.36, color=COLOURS[stage], alpha=alpha, linewidth=0)
                    top = _whisker(axis, x + offset, value, stages[stage].get(f"{name}_ci95"))
                    axis.text(x + offset, top + 0.02, f"{value:.2f}", ha="center", va="bottom", fontsize=7.5)
            axis.set_xticks(range(len(present)), [TITLES[stage].replace(" on ", "\non ") for stage in present])
            axis.set_ylim(0, 1.12)
            axis.set_yticks(np.linspace(0, 1, 6))
            axis.grid(axis="x", visible=False)
            axis.set_title(task)
            if index == 0:
                axis.set_ylabel("gold on the test split")
        keys = [Rectangle((0, 0), 1, 1, color="#5D6675", alpha=alpha, linewidth=0) for alpha in (1.0, 0.45)]
        figure.legend(keys, ["greedy", "sampled"], loc="outside upper right", ncols=2, fontsize=8.5)
        return _svg(figure)


def win_rates(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Win rate against SFT with its 95 % interval, a row per stage; the dashed line is no difference."""
    with _figure(len(tasks), height=2.5) as (figure, axes):
        for axis, (task, stages) in zip(axes, tasks.items()):
            present = [s for s in POLICY_STAGES if s != "sft" and s in stages]
            for y, stage in enumerate(present):
                value, (low, high) = stages[stage]["win_vs_sft"], stages[stage]["win_ci95"]
                axis.plot([low, high], [y, y], color=COLOURS[stage], linewidth=3, alpha=0.45, solid_capstyle="round")
                axis.plot(value, y, "o", color=COLOURS[stage], markersize=7)
                axis.annotate(f"{value:.2f}", (value, y), (0, 8), textcoords="offset points", ha="center", fontsize=8)
            axis.axvline(0.5, color="#9AA3B2", linestyle=(0, (4, 3)), linewidth=1.1)
            axis.set_yticks(range(len(present)), [TITLES[stage] for stage in present])
            axis.set_ylim(len(present) - 0.4, -0.75)
            ends = [end for stage in present for end in stages[stage]["win_ci95"]]
            axis.set_xlim(min([0.4, *(end - 0.03 for end in ends)]), 1.02)
            axis.grid(axis="y", visible=False)
            axis.set_title(task)
            axis.set_xlabel("win rate against SFT (ties ½)")
        return _svg(figure)


def frontier(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """Gold against the distance from the reference: filled is the chosen checkpoint, hollow the final one."""
    with _figure(len(tasks), height=3.1) as (figure, axes):
        for index, (axis, (task, stages)) in enumerate(zip(axes, tasks.items())):
            for stage in (stage for stage in POLICY_STAGES if stage in stages):
                chosen, final = stages[stage], stages[stage].get("final")
                point = (chosen["seq_kl"], chosen["gold_sample"])
                if final:
                    end = (final["seq_kl"], final["gold_sample"])
                    axis.plot(*zip(point, end), color=COLOURS[stage], linewidth=1, alpha=0.5)
                    axis.plot(*end, "o", markersize=7.5, markerfacecolor="white", markeredgecolor=COLOURS[stage], markeredgewidth=1.6)
                axis.plot(*point, "o", markersize=7.5, color=COLOURS[stage], label=TITLES[stage])
            axis.margins(0.12, 0.16)
            axis.set_title(task)
            axis.set_xlabel("KL from the reference, nats per sequence")
            if index == 0:
                axis.set_ylabel("gold, sampled")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8.5, columnspacing=1.2, handletextpad=0.2)
        return _svg(figure)


def lines(panels: Mapping[str, Mapping[str, Sequence[Sequence[tuple[float, float]]]]], *, x: str, y: str) -> str:
    """Repeated measurements as lines, their mean in bold over each of them; a panel per task.

    Args:
      panels: task -> name -> one list of points per seed, all of one length.
      x, y: labels of the axes.
    """
    with _figure(len(panels), height=3.4) as (figure, axes):
        for index, (axis, (task, named)) in enumerate(zip(axes, panels.items())):
            for number, (name, seeds) in enumerate(named.items()):
                points, colour = np.array(seeds, float), _SERIES[number % len(_SERIES)]
                for one in points:
                    axis.plot(one[:, 0], one[:, 1], color=colour, linewidth=0.8, alpha=0.35)
                axis.plot(*points.mean(0).T, "o-", color=colour, markersize=4, linewidth=1.8, label=name)
            axis.set_title(task)
            axis.set_xlabel(x)
            if index == 0:
                axis.set_ylabel(y)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper right", ncols=len(labels), fontsize=8.5, columnspacing=1.2, handletextpad=0.4)
        return _svg(figure)


def stacked_bars(parts: Mapping[str, Mapping[str, float]], beside: Mapping[str, Mapping[str, float]], *, limit: float, title: str, left: str,
                 right: str) -> str:
    """What things are made of, as stacked bars against a limit, and next to them other measurements of the same things, side by side.

    Args:
      parts: thing -> part -> amount.
      beside: thing -> measurement -> amount.
      limit: of the sum of the parts.
      title: over the left panel.
      left, right: labels of the amounts.
    """
    with _figure(2, height=0.9 + 0.34 * max(len(parts), len(beside), 3)) as (figure, (stack, bars)):
        names = list(parts)
        start = np.zeros(len(names))
        for number, part in enumerate(next(iter(parts.values()))):
            sizes = np.array([parts[name][part] for name in names])
            stack.barh(names, sizes, left=start, color=_SERIES[number % len(_SERIES)], label=part, height=0.62)
            start = start + sizes
        stack.axvline(limit, color="#C2456B", linestyle=(0, (4, 3)), linewidth=1.2)
        stack.set_xlabel(left)
        stack.set_title(title)
        stack.legend(fontsize=7.5, loc="lower right")
        kinds = list(next(iter(beside.values()), {}))
        for number, kind in enumerate(kinds):
            at = np.arange(len(beside)) + (number - (len(kinds) - 1) / 2) * 0.24
            bars.barh(at, [max(row[kind], 1e-9) for row in beside.values()], 0.22, color=_SERIES[(number + 2) % len(_SERIES)], label=kind)
        bars.set_yticks(range(len(beside)), list(beside))
        bars.set_xscale("log")
        bars.set_xlabel(right)
        bars.legend(fontsize=7.5, loc="lower right")
        for axis in (stack, bars):
            axis.invert_yaxis()
            axis.grid(axis="y", visible=False)
        return _svg(figure)


def save(picture: str, path: str | os.PathLike) -> None:
    """Writes a picture as an SVG file.

    Args:
      picture: as the functions above give it.
      path: the file.
    """
    write_whole(path, base64.b64decode(picture.split(",", 1)[1]).decode())


def training_curves(runs: Mapping[str, str | os.PathLike]) -> str | None:
    """Small multiples of what each run logged: a row per stage, up to four metrics that tell its story.

    Args:
      runs: stage -> working folder that holds metrics.jsonl; stages without metrics are left out.

    Returns:
      the picture, or None where no run has metrics.
    """
    rows = []
    for stage in (stage for stage in STAGES if stage in runs):
        series = read_series(pathlib.Path(runs[stage]) / "metrics.jsonl")
        chosen = story(stage, series)
        if chosen:
            rows.append((stage, series, chosen))
    if not rows:
        return None
    columns = max(len(chosen) for _, _, chosen in rows)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(10.4, 1.75 * len(rows)), layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.06))
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for (stage, series, chosen), line in zip(rows, grid):
            for axis in line[len(chosen) :]:
                axis.set_axis_off()
            for axis, name in zip(line, chosen):
                _curve(axis, *series[name], COLOURS[stage])
                axis.set_title(name, fontsize=8.5, fontweight="normal")
            line[0].set_ylabel(TITLES[stage], fontweight="bold", color=COLOURS[stage], fontsize=10, labelpad=8)
        for axis in grid[-1]:
            axis.set_xlabel("update", fontsize=8.5)
        return _svg(figure)


def read_series(path: str | os.PathLike) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """metric -> (steps, values) of a metrics.jsonl; what is no finite number there is no point.

    Args:
      path: the file; a missing one has no metrics.

    Raises:
      UserError: a line of it is not a log's.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for _, record in records(path):
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                points.setdefault(name, []).append((record["step"], float(value)))
    return {name: (np.array([s for s, _ in pairs]), np.array([v for _, v in pairs])) for name, pairs in points.items()}


def story(stage: str, series: Mapping[str, Any]) -> list[str]:
    """Up to four metric names of a run worth drawing, best first; one of each kind before a second of any."""
    patterns = _STORY.get(stage, _ONLINE)
    kinds = [[name for name in sorted(series) if re.search(pattern, name)] for pattern in patterns]
    depth = max((len(names) for names in kinds), default=0)
    ranked = [names[rank] for rank in range(depth) for names in kinds if rank < len(names)]
    return list(dict.fromkeys(ranked))[:_PANELS]


def _curve(axis: Axes, steps: np.ndarray, values: np.ndarray, colour: str) -> None:
    """The raw series; over a long one, its running mean on top."""
    if len(steps) == 1:
        axis.plot(steps, values, "o", color=colour, markersize=4)
    elif len(steps) <= 40:
        axis.plot(steps, values, color=colour, linewidth=1.6, marker="o" if len(steps) <= 12 else None, markersize=3)
    else:
        axis.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        axis.plot(steps, _running_mean(values, max(5, len(values) // 25)), color=colour, linewidth=1.7)
    axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 4), useOffset=False)
    axis.tick_params(labelsize=7.5)
    axis.locator_params(nbins=4)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over a window that shrinks at both ends; entries that are not finite do not count."""
    finite = np.isfinite(values)
    total = np.convolve(np.where(finite, values, 0.0), np.ones(width), mode="same")
    count = np.convolve(finite.astype(float), np.ones(width), mode="same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _whisker(axis: Axes, x: float, value: float, interval: Sequence[float] | None) -> float:
    """Draw the interval, if there is one; returns the height above which a label is free."""
    if interval is None:
        return value
    low, high = interval
    axis.plot([x, x], [low, high], color="#3B4352", linewidth=1.1, solid_capstyle="butt")
    return max(value, high)


@contextlib.contextmanager
def _figure(panels: int, height: float) -> Iterator[tuple[Figure, Sequence[Axes]]]:
    """A row of panels, two at most, then the next row."""
    with matplotlib.rc_context(_STYLE):
        columns = min(panels, 2)
        rows = -(-panels // columns)
        figure = Figure(figsize=(10.4, height * rows), layout=ConstrainedLayoutEngine(h_pad=0.06, w_pad=0.06))
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.set_axis_off()
        yield figure, axes


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
