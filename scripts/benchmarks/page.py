"""Writes what was measured as a table, a page and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.contestants import BASELINE, CONTESTANTS, LIMIT_ROWS
from benchmarks.workloads import WORKLOADS, Shape

MIB = 2**20

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
BLUE, ORANGE, GREY, INK = "#0072B2", "#E69F00", "#999999", "#333333"

Report = dict[str, Any]
"""What the JSON file holds."""

INTRODUCTION = """\
# Speed and memory beside the stock Trainer

Written by `scripts/benchmark.py`; run it again to measure on your machine. All that was measured is in
[{name}.json]({name}.json).

Each measurement is a process of its own: a warm-up step of short rows, then whole epochs. {turns} All train the same
rows with the same optimizer (AdamW, in float32, with the model's dropout), and with the default options but for what
their names say.

* **rows a step**: `per_device_train_batch_size` x `gradient_accumulation_steps`.
* **useful tokens**: those that are not padding, counted at the model itself.
* **peak memory**: {memory}, on top of what the process held after import and
  model building. It covers gradients and optimizer states as well as activations, and whatever a trainer tries before
  its first step.
* **before**: seconds between the warm-up and the first step: reading the first rows, and what `MBPTrainer` finds out
  about model and memory. They are not part of the speed.
* **max_tokens**: `max_tokens_per_micro_batch={max_tokens}`. **memory_limit**: {headroom:,.0f} MiB more than the process
  holds before training. Without them `MBPTrainer` may take nine tenths of the free memory, and takes what is fastest.
* **equal rows, plain PyTorch**: the goal post, a loop without a Trainer and with nothing to pad: as many rows, each of
  the mean length, {limit_rows} at a time. Its tokens are as many but for rounding, and attention has less to do than
  over rows of unequal lengths.
* `group_by_length` and `batch_rebalance` change nothing where a step is one batch, and are left out there. In a data
  set as small as this one `group_by_length` sorts the rows of one step at a time; in a large one those of 50, which
  pads less, and makes steps of rows of nearly one length.
* `mbp-pytorch` and `online-dynamic-batching` take part where they are installed; how, says the head of the script. Both
  train in plain PyTorch. The former splits the padded batch, {limit_rows} rows at a time. The latter, with {max_tokens}
  tokens a batch, steps after the batch that completes the rows of a step: its steps are other, larger ones.
"""

TURNS = (
    "The contestants take turns, {count}\ntimes; given are median and range. "
    "Ratios to `Trainer` are between measurements of the same turn."
)
ONE_TURN = "Every contestant was measured once,\nso nothing is known about the spread."

BUSY = 0.25
"""Share of the cores that others used when the measurements began, from which the reader is warned."""

MEMORY = {"cpu": "the highest resident memory", "cuda": "the most memory that torch had reserved on the GPU"}


def page(report: Report, name: str) -> str:
    """The page, in Markdown; `name` is that of the files beside it."""
    settings = report["settings"]
    introduction = INTRODUCTION.format(
        name=name,
        turns=TURNS.format(count=repetitions) if (repetitions := settings["repetitions"]) > 1 else ONE_TURN,
        memory=MEMORY[settings["device"]],
        max_tokens=settings["max_tokens"],
        headroom=settings["headroom_bytes"] / MIB,
        limit_rows=LIMIT_ROWS,
    )
    measured = (
        f"Measured on {report['machine']}; {report['versions']}; {report['seconds'] / 60:.0f} minutes in all. "
        f"{busy_note(report)}\n\n    {report['command']}\n"
    )
    return "\n".join([introduction, f"![Speed and memory]({name}.png)\n", measured, tables(report)])


def busy_note(report: Report) -> str:
    """How busy the machine was with others."""
    load, cores = report["load_before"], report["cores"]
    note = f"Load of the machine when it began: {load:.1f} on {cores} cores."
    if load > BUSY * cores:
        note += " **Other programs were running: speeds are too low, and their ratios rough.** Memory is not affected."
    return note


def tables(report: Report) -> str:
    """A table for each place."""
    return "\n".join(table(workload, shape, entries) for (workload, shape), entries in places(report).items())


def places(report: Report) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The entries of each workload and shape."""
    grouped: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for entry in report["summary"]:
        grouped.setdefault((entry["workload"], entry["shape"]), []).append(entry)
    return grouped


def table(workload: str, shape: str, entries: list[dict[str, Any]]) -> str:
    """Of one place."""
    lines = [
        f"## {workload}, {title_of(shape)}\n",
        f"{WORKLOADS[workload].what}.\n",
        "| contestant | useful tokens/s | x Trainer | padding | micro-batches a step | peak memory (MiB) | x Trainer "
        "| before (s) |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        *(row(entry) for entry in entries),
        "",
    ]
    return "\n".join(lines)


def title_of(shape: str) -> str:
    """A shape in words."""
    parsed = Shape.parse(shape)
    return f"{parsed.rows_per_batch} x {parsed.batches} rows a step"


def row(entry: dict[str, Any]) -> str:
    """Of one contestant."""
    title = CONTESTANTS[entry["contestant"]].title
    if entry["error"]:
        return f"| {title} | **fails**: {entry['error'].splitlines()[0][:80]} | | | | | | |"
    return (
        f"| {title} | {ranged(entry['tokens_per_second'], '{:,.0f}')} | {ranged(entry['speed_ratio'], '{:.2f}')} "
        f"| {entry['padding_fraction']:.1%} | {entry['micro_batches_per_step']:.1f} "
        f"| {ranged(entry['peak_bytes'], '{:,.0f}', MIB)} | {ranged(entry['memory_ratio'], '{:.2f}')} "
        f"| {ranged(entry['setup_seconds'], '{:.1f}')} |"
    )


def ranged(values: dict[str, float] | None, form: str, unit: int = 1) -> str:
    """A median with its range.

    Example:
        >>> ranged({"median": 2, "min": 1, "max": 3}, "{:.1f}")
        '2.0 (1.0..3.0)'
    """
    if values is None:
        return ""
    median, low, high = (form.format(values[name] / unit) for name in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}..{high})"


def draw(report: Report, path: Path) -> None:
    """Two pictures for each place: bars of speed and of memory, with their ranges."""
    grouped = places(report)
    heights = [1.1 + 0.36 * len(entries) for entries in grouped.values()]
    figure = Figure(figsize=(11, sum(heights)), layout="constrained")
    grid = figure.subplots(len(grouped), 2, squeeze=False, height_ratios=heights)
    for (speed, memory), ((workload, shape), entries) in zip(grid, grouped.items(), strict=True):
        where = f"{workload}, {title_of(shape)}"
        draw_bars(speed, entries, "tokens_per_second", 1, f"{where}: useful tokens a second", "higher is better")
        draw_bars(memory, entries, "peak_bytes", MIB, "peak memory (MiB)", "lower is better")
        memory.set_yticklabels([])
    figure.savefig(path, dpi=150)


def draw_bars(axes: Any, entries: list[dict[str, Any]], value: str, unit: int, title: str, better: str) -> None:
    """A bar for each contestant; one that failed has none."""
    spreads = [entry.get(value) or {"median": 0, "min": 0, "max": 0} for entry in entries]
    medians = [spread["median"] / unit for spread in spreads]
    ranges = [
        [(spread["median"] - spread["min"]) / unit for spread in spreads],
        [(spread["max"] - spread["median"]) / unit for spread in spreads],
    ]
    axes.barh(range(len(entries)), medians, xerr=ranges, height=0.62, color=[colour(e) for e in entries], ecolor=INK)
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
    axes.xaxis.set_major_formatter("{x:,.0f}")


def colour(entry: dict[str, Any]) -> str:
    """Of ours, of what it is compared with, and of the goal post."""
    name = entry["contestant"]
    if name.startswith("mbp"):
        return BLUE
    return GREY if not name.startswith((BASELINE, "group", "batch")) else ORANGE
