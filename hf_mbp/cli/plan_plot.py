"""The picture of a plan: lengths, memory, and the micro-batches of a few steps beside the plain Trainer's batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_mbp.byte_sizes import format_bytes
from hf_mbp.cli.plan_groups import Group, StepPlan
from hf_mbp.cli.run_plan import RunPlan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREY, _RED = "#0072B2", "#E69F00", "#999999", "#D55E00"
_DPI = 150
_GIB = 2**30


def plot_plan(plan: RunPlan, num_steps: int, path: Path) -> None:
    """Draw the plan with the first `num_steps` steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps = plan.steps[:num_steps]
    figure = Figure(figsize=(max(10.0, 3.4 * len(steps)), 11), layout="constrained")
    FigureCanvasAgg(figure)
    parts: Any = figure.subfigures(2, 1, height_ratios=[2, 5])
    above, below = parts
    histogram, peaks = above.subplots(1, 2)
    _draw_lengths(histogram, plan)
    _draw_peaks(peaks, plan, steps)
    grid = below.subplots(2, len(steps), squeeze=False, sharex=True, sharey=True)
    for column, step in enumerate(steps):
        _draw_step(grid[0][column], step.split, f"step {column + 1}: {len(step.split):,} micro-batches")
        _draw_step(grid[1][column], step.plain, "the same rows in the plain Trainer")
        grid[1][column].set_xlabel("tokens")
    grid[0][0].set_ylabel("rows")
    grid[1][0].set_ylabel("rows")
    grid[0][0].invert_yaxis()  # shared: the longest micro-batch runs first, and stands on top
    below.legend(*grid[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=_DPI)


def _draw_lengths(axes: Axes, plan: RunPlan) -> None:
    axes.hist(plan.lengths, bins=min(60, int(plan.lengths.max())), color=_BLUE, edgecolor="white", linewidth=0.3)
    median = float(np.median(plan.lengths))
    axes.axvline(median, color=_RED, linestyle="--", linewidth=1.2, label=f"median: {median:,.0f}")
    axes.set(title=f"Lengths of {len(plan.lengths):,} rows", xlabel="tokens a row", ylabel="rows")
    axes.legend(frameon=False)
    _tidy(axes)


def _draw_peaks(axes: Axes, plan: RunPlan, steps: Sequence[StepPlan]) -> None:
    start = 0
    for number, step in enumerate(steps):
        heights = [plan.memory.peak(group) / _GIB for group in step.split]
        x = np.arange(start, start + len(heights))
        axes.bar(x, heights, width=0.85, color=_BLUE, label="predicted peak" if number == 0 else None)
        axes.annotate(f"step {number + 1}", (float(x.mean()), 0), xytext=(0, -12), **_UNDER)
        start += len(heights) + 1
    resident = plan.memory.resident_bytes / _GIB
    axes.axhspan(0, resident, color=_GREY, alpha=0.55, linewidth=0, label="weights, gradients, optimizer")
    if plan.memory.limit_bytes is not None:
        limit = plan.memory.limit_bytes
        axes.axhline(limit / _GIB, color=_RED, linestyle="--", linewidth=1.2, label=f"limit: {format_bytes(limit)}")
    axes.set(title="Memory of each micro-batch", ylabel="GiB", xticks=[])
    axes.margins(y=0.42)  # room for the legend
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="upper right", fontsize=9, ncols=2)
    _tidy(axes)


_UNDER: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "annotation_clip": False}


def _draw_step(axes: Axes, groups: Sequence[Group], title: str) -> None:
    """Each row a bar as long as its tokens, on the box of its micro-batch; white lines are between micro-batches."""
    rows = 0
    for number, group in enumerate(groups):
        y = np.arange(rows, rows + group.rows) + 0.5
        first = number == 0
        axes.barh(y, [group.width] * group.rows, height=1.0, color=_ORANGE, label="padding" if first else None)
        axes.barh(y, group.lengths, height=1.0, color=_BLUE, label="tokens" if first else None)
        rows += group.rows
        axes.plot([0, group.width], [rows, rows], color="white", linewidth=1.2, solid_capstyle="butt")
    cells = sum(group.cells for group in groups)
    padding = 1 - sum(group.tokens for group in groups) / cells
    axes.set_title(f"{title}\n{cells:,} cells, {padding:.1%} padding".replace("%", " %"), fontsize=10)
    axes.margins(0)
    axes.spines[["top", "right"]].set_visible(False)


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
