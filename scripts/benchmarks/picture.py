"""Draws what was measured: bars of speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.contestants import CONTESTANTS, GOAL, OTHERS, OURS, STOCK
from benchmarks.page import MIB, Entry, Report, places, title_of

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
GREY, INK = "#999999", "#333333"
COLOURS = {OURS: "#0072B2", STOCK: "#E69F00", OTHERS: "#CC79A7", GOAL: GREY}


def draw(report: Report, output: Path) -> None:
    """A picture for each workload, beside the page."""
    for workload, shapes in places(report).items():
        draw_workload(shapes, Path(f"{output}-{workload}.png"))


def draw_workload(shapes: dict[str, list[Entry]], path: Path) -> None:
    """Two panels for each shape: bars of speed and of memory, with their ranges."""
    heights = [1.1 + 0.32 * len(entries) for entries in shapes.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    grid = figure.subplots(len(shapes), 2, squeeze=False, height_ratios=heights)
    for (speed, memory), (shape, entries) in zip(grid, shapes.items(), strict=True):
        title = f"{title_of(shape)}: useful tokens a second"
        draw_bars(speed, entries, "tokens_per_second", 1, title, "higher is better")
        draw_bars(memory, entries, "peak_bytes", MIB, "peak memory (MiB)", "lower is better")
        memory.set_yticklabels([])
    figure.savefig(path, dpi=150)


def draw_bars(axes: Any, entries: list[Entry], value: str, unit: int, title: str, better: str) -> None:
    """A bar for each contestant; one that failed has none."""
    spreads = [entry.get(value) or {"median": 0, "min": 0, "max": 0} for entry in entries]
    medians = [spread["median"] / unit for spread in spreads]
    ranges = [
        [(spread["median"] - spread["min"]) / unit for spread in spreads],
        [(spread["max"] - spread["median"]) / unit for spread in spreads],
    ]
    axes.barh(
        range(len(entries)),
        medians,
        xerr=ranges,
        height=0.62,
        color=[COLOURS[CONTESTANTS[e["contestant"]].family] for e in entries],
        ecolor=INK,
    )
    for y, (entry, spread) in enumerate(zip(entries, spreads, strict=True)):
        text = "fails" if entry["error"] else f"{spread['median'] / unit:,.0f}"
        axes.annotate(
            text, (spread["max"] / unit, y), xytext=(5, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(entries)), [CONTESTANTS[entry["contestant"]].title for entry in entries])
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel(better, fontsize=9)
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", color=GREY, alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter("{x:,.0f}")
