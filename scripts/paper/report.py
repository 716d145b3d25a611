"""Writes what `paper_claim.py` has measured as a page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

MIB = 2**20

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREY, RED = "#0072B2", "#E69F00", "#999999", "#D55E00"

Results = list[dict[str, Any]]

INTRODUCTION = """\
# The claim of the paper, reproduced

[Piao et al.](https://arxiv.org/abs/2110.12484) claim that with micro-batches a mini-batch may be far larger than what
fits the memory, and that the model learns as if it did fit. Here the mini-batch is the whole data set. The limit is
real: once model and data are there, the process may take only so many MiB more (`RLIMIT_AS` on a CPU, the fraction of
the memory on a GPU), for gradients, the states of AdamW and activations. No budget is named: `MBPTrainer` finds it.

Memory is address space, which is what `RLIMIT_AS` limits (on a GPU, what torch has reserved), at its highest, counted
from when model and data were there. A micro-batch has fewer rows than the plain `Trainer` can hold: beside its
activations stand the gradients of the rows before it, and a tenth of the limit is left free.

Each run is a process of its own, in float32 and without dropout. On a CPU glibc was told to return freed tensors to the
system (`MALLOC_MMAP_THRESHOLD_=131072`), for either trainer: else its peak depends on how freed pieces happen to fit.

Written by `scripts/paper_claim.py`; run it again to measure on your machine.
"""


def write_report(results: Results, output: Path) -> None:
    """Writes `output` with .md and .png."""
    draw(results, Path(f"{output}.png"))
    parts = [INTRODUCTION, f"![Losses and peak memory]({output.name}.png)\n", f"Measured on {results[0]['machine']}.\n"]
    parts += [section(result) for result in results]
    Path(f"{output}.md").write_text("\n".join(parts), encoding="utf-8")


def section(result: dict[str, Any]) -> str:
    """Table and verdict of a case."""
    rows, fits, most_rows = result["data_set_rows"], result["fits"], result["most_rows"]
    headroom = result["headroom_bytes"] / MIB
    runs = [
        ("`Trainer`", rows, "none", result["unlimited"]),
        ("`Trainer`", rows, f"{headroom:,.0f} MiB", result["stock"]),
        ("`MBPTrainer`", rows, f"{headroom:,.0f} MiB", result["limited"]),
        ("`Trainer`", most_rows, f"{headroom:,.0f} MiB", result["at_most"]),
        *(
            ("`MBPTrainer`", int(times) * fits, f"{headroom:,.0f} MiB", outcome)
            for times, outcome in result["multiples"].items()
        ),
    ]
    lines = [
        f"## {result['title']}: {result['data']}\n",
        f"The data set has {rows:,} rows; the plain `Trainer` can just hold {most_rows:,} under the limit. The last "
        f"runs have {', '.join(result['multiples'])} times the {fits:,} rows that fit as one micro-batch.\n",
        "| trainer | rows a step | limit | peak memory | micro-batches | first and last loss |",
        "| --- | ---: | --- | ---: | ---: | --- |",
        *(table_row(*run) for run in runs),
        "",
        *(f"* {'yes' if holds else '**no**'}: {text}" for text, holds in result["checks"].items()),
        "",
    ]
    return "\n".join(lines)


def table_row(trainer: str, rows: int, limit: str, outcome: dict[str, Any]) -> str:
    """A run."""
    if outcome["error"]:
        return f"| {trainer} | {rows:,} | {limit} | **fails**: no memory left | | |"
    losses = outcome["losses"]
    return (
        f"| {trainer} | {rows:,} | {limit} | {outcome['peak_bytes'] / MIB:,.0f} MiB | {outcome['micro_batches']:.0f} | "
        f"{losses[0]:.6f}, {losses[-1]:.6f} |"
    )


def draw(results: Results, path: Path) -> None:
    """A row of two pictures for each case: losses, and peaks against the limit."""
    figure = Figure(figsize=(11, 3.9 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 2, squeeze=False)
    for (left, right), result in zip(grid, results, strict=True):
        draw_losses(left, result)
        draw_peaks(right, result)
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
            axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def draw_losses(axes: Any, result: dict[str, Any]) -> None:
    """The run without a limit as a broad line, the run under it as points upon it."""
    plain, ours = result["unlimited"]["losses"], result["limited"]["losses"]
    axes.plot(range(1, len(plain) + 1), plain, color=BLUE, alpha=0.35, linewidth=7, label="Trainer, no limit")
    axes.plot(range(1, len(ours) + 1), ours, color=BLUE, marker="o", linewidth=1.2, label="MBPTrainer under the limit")
    axes.set(
        title=f"{result['title']}, all {result['data_set_rows']:,} rows in one mini-batch",
        xlabel="optimizer step",
        ylabel="loss",
    )
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)


def draw_peaks(axes: Any, result: dict[str, Any]) -> None:
    """A bar for each size; the plain Trainer's is what it would take."""
    limit, fits = result["headroom_bytes"] / MIB, result["fits"]
    bars = [
        (f"Trainer\n{result['most_rows']:,}", result["at_most"], ORANGE),
        *((f"{times} x\n{int(times) * fits:,}", outcome, BLUE) for times, outcome in result["multiples"].items()),
        (f"data set\n{result['data_set_rows']:,}", result["limited"], BLUE),
        (f"Trainer\n{result['data_set_rows']:,}", result["unlimited"], ORANGE),
    ]
    heights = [outcome["peak_bytes"] / MIB for _, outcome, _ in bars]
    axes.bar([label for label, _, _ in bars], heights, width=0.6, color=[colour for _, _, colour in bars])
    for x, height in enumerate(heights):
        above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "fontsize": 9}
        beside_limit = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.annotate(f"{height:,.0f}", (x, height), bbox=beside_limit, **above)
    axes.bar([0], [0], color=BLUE, label="MBPTrainer")
    axes.bar([0], [0], color=ORANGE, label="Trainer (rightmost: without the limit)")
    axes.axhline(limit, color=RED, linestyle="--", linewidth=1.2, label=f"limit: {limit:,.0f} MiB")
    axes.set(title="Peak memory", xlabel="rows in a mini-batch", ylabel="MiB")
    axes.margins(y=0.12)
    axes.legend(frameon=False, loc="upper left")
