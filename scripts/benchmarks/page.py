"""Writes what was measured as a page: tables, and how to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.contestants import CONTESTANTS, GOAL
from benchmarks.sizes import SIZES
from benchmarks.task import PART_ROWS
from benchmarks.workloads import WORKLOADS, Shape

MIB = 2**20

Report = dict[str, Any]
"""What the JSON file holds."""

Entry = dict[str, Any]
"""Of the summary: one contestant in one place."""

INTRODUCTION = """\
# Speed, memory and loss beside the stock Trainer: {workloads}

How fast `MBPTrainer` trains beside other ways to train the same rows, how much memory each takes, and which loss it
reaches. Written by `scripts/benchmark.py`; run it again to measure on your machine. All that was measured is in
[{name}.json]({name}.json). The tables are [below](#{first}); first, how to read them.

Each measurement is a process of its own: a warm-up step of short rows, then whole epochs. {turns} All train the same
rows with the same optimizer (AdamW, {precision}, with the model's dropout), and with the default options but for what
their names say.

* **rows a step**: `per_device_train_batch_size` x `gradient_accumulation_steps`.
* **useful tokens**: those that are not padding, counted at the model itself.
* **peak memory**: {memory}, on top of what the process held after import and
  model building. It covers gradients and optimizer states as well as activations, and whatever a trainer tries before
  its first step.
* **loss**: of the trained model, over all rows of the workload, in plain PyTorch and without dropout. All have seen the
  same rows, so a higher one is what speed was paid for with. Something can be learned from the rows in a few steps:
  their first word tells the class, or, for language models, some words are frequent and some follow others. Order and
  dropout differ, so small differences mean nothing, and a tiny model learns next to nothing. Rows that were cut so that
  nothing is padded are other rows, and have no loss here.
* **before**: seconds between the warm-up and the first step: reading the first rows, and what `MBPTrainer` finds out
  about model and memory. They are not part of the speed.
* **max_tokens**: `max_tokens_per_micro_batch={max_tokens}`. **memory_limit**: {headroom:,.0f} MiB more than the process
  holds before training. Without them `MBPTrainer` may take nine tenths of the free memory, and takes what is fastest.
* **nothing padded, plain PyTorch**: the limit, a loop without a Trainer that runs the micro-batches which
  `MBPTrainer` plans, each with rows of their mean length. **of the limit**: the share of its speed in the same turn.
* `group_by_length` and `batch_rebalance` change nothing where a step is one batch, and are left out there. In a data
  set as small as this one `group_by_length` sorts the rows of one step at a time; in a large one those of 50, which
  pads less, and makes steps of rows of nearly one length.
* Other packages take part where they are installed; how, says the head of the script.
  `mbp-pytorch` and `online-dynamic-batching` train in plain PyTorch. The former splits the padded batch, {part_rows}
  rows at a time. The latter, with {max_tokens} tokens a batch, steps after the batch that completes the rows of a step:
  its steps are other, larger ones.
* **TRL** is `SFTTrainer`, for language models only, without the recomputation of activations that it does by default.
  It also computes entropy and accuracy in every step. Padding-free, the rows of a batch are one long row with a mask
  between them: without FlashAttention attention costs the square of its length. Packing puts rows together by length,
  once before training (best fit decreasing, into packs of the longest row's length, one at a time). No row is cut and
  none sees another, but a step has other rows than by chance, and other numbers of them than were asked for.
"""

TURNS = (
    "The contestants take turns, {count}\ntimes; given are median and range. "
    "Ratios to `Trainer` are between measurements of the same turn."
)
ONE_TURN = "Every contestant was measured once,\nso nothing is known about the spread."

BUSY = 0.25
"""Share of the cores that others used when the measurements began, from which the reader is warned."""

PRECISION = {"float32": "in float32", "bfloat16": "with forward passes in bfloat16 and weights in float32"}

ON_A_GPU = """\
* **FLOPs used**: what useful tokens need, six operations a weight and twelve for each pair of positions, layer and
  hidden unit, of what the GPU's data sheet promises (dense, bfloat16). Padding and recomputation do not count.
* **of the GPU's**: the most memory that was held, model included, as a share of all that the GPU has.
"""

MEMORY = {"cpu": "the highest resident memory", "cuda": "the most memory that torch had reserved on the GPU"}


def page(report: Report, name: str) -> str:
    """The page, in Markdown; `name` is that of the files beside it."""
    settings = report["settings"]
    introduction = INTRODUCTION.format(
        name=name,
        workloads=", ".join(places(report)),
        first=next(iter(places(report))),
        turns=TURNS.format(count=repetitions) if (repetitions := settings["repetitions"]) > 1 else ONE_TURN,
        precision=PRECISION[settings["dtype"]],
        memory=MEMORY[settings["device"]],
        max_tokens=settings["max_tokens"],
        headroom=settings["headroom_bytes"] / MIB,
        part_rows=PART_ROWS,
    )
    if settings["device"] == "cuda":
        introduction += ON_A_GPU
    measured = (
        f"Measured on {report['machine']}; {report['versions']}; {report['seconds'] / 60:.0f} minutes in all. "
        f"{busy_note(report)}\n\n    {report['command']}\n"
    )
    return "\n".join([introduction, measured, tables(report, name)])


def busy_note(report: Report) -> str:
    """How busy the machine was with others."""
    load, cores = report["load_before"], report["cores"]
    note = f"Load of the machine when it began: {load:.1f} on {cores} cores."
    if load > BUSY * cores:
        note += " **Other programs were running: speeds are too low, and their ratios rough.** Memory is not affected."
    return note


def tables(report: Report, name: str | None = None) -> str:
    """A section for each workload, with a table for each shape; with the picture beside the page of that `name`."""
    columns = filled(columns_of(report["settings"]), report["summary"])
    sections = []
    for workload, shapes in places(report).items():
        sections.append(f"## {workload}\n\n{what_of(workload, next(iter(shapes.values()))[0])}\n")
        if name is not None:
            sections.append(f"![Speed and memory, {workload}]({name}-{workload}.png)\n")
        sections += [table(shape, entries, columns) for shape, entries in shapes.items()]
    return "\n".join(sections)


def places(report: Report) -> dict[str, dict[str, list[Entry]]]:
    """The entries of each workload and shape."""
    grouped: dict[str, dict[str, list[Entry]]] = {}
    for entry in report["summary"]:
        grouped.setdefault(entry["workload"], {}).setdefault(entry["shape"], []).append(entry)
    return grouped


def what_of(name: str, entry: Entry) -> str:
    """Workload and model in words, and the loss of a model that knows nothing."""
    workload, size = WORKLOADS[name], SIZES[entry["size"]]
    model = size.what(is_language_model=workload.is_language_model)
    return f"{model}; {workload.what}. The loss is {workload.untrained_loss(size):.3f} if nothing is learned."


@dataclass(frozen=True, kw_only=True)
class Column:
    """Of a table: its title, and what a contestant has there."""

    title: str
    cell: Callable[[Entry], str]


def columns_of(settings: dict[str, Any]) -> list[Column]:
    """Those of a CPU, and two more of a GPU whose memory and speed are known."""
    columns = [
        Column(title="useful tokens/s", cell=lambda e: ranged(e["tokens_per_second"], "{:,.0f}")),
        Column(title="x Trainer", cell=lambda e: ranged(e["speed_ratio"], "{:.2f}")),
        Column(title="of the limit", cell=lambda e: "" if is_goal(e) else ranged(e["share_of_limit"], "{:.2f}")),
        Column(title="padding", cell=lambda e: f"{e['padding_fraction']:.1%}"),
        Column(title="micro-batches a step", cell=lambda e: f"{e['micro_batches_per_step']:.1f}"),
        Column(title="peak memory (MiB)", cell=lambda e: ranged(e["peak_bytes"], "{:,.0f}", MIB)),
        Column(title="loss", cell=lambda e: "" if is_goal(e) else ranged(e["loss"], "{:.3f}")),
        Column(title="before (s)", cell=lambda e: ranged(e["setup_seconds"], "{:.1f}")),
    ]
    if total := settings["device_bytes"]:
        columns.insert(6, Column(title="of the GPU's", cell=lambda e: ranged(e["held_bytes"], "{:.0%}", total)))
    if peak := settings["peak_flops"]:
        columns.insert(2, Column(title="FLOPs used", cell=lambda e: ranged(e["flops_per_second"], "{:.1%}", peak)))
    return columns


def filled(columns: list[Column], entries: list[Entry]) -> list[Column]:
    """Those in which any of the entries has something: what others are compared with may have been left out."""
    whole = [entry for entry in entries if not entry["error"]]
    return [column for column in columns if any(map(column.cell, whole))]


def table(shape: str, entries: list[Entry], columns: list[Column]) -> str:
    """Of one place."""
    lines = [
        f"### {title_of(shape)}\n",
        as_row("contestant", [column.title for column in columns]),
        as_row("---", ["---:"] * len(columns)),
        *(row(entry, columns) for entry in entries),
        "",
    ]
    return "\n".join(lines)


def title_of(shape: str) -> str:
    """A shape in words."""
    parsed = Shape.parse(shape)
    return f"{parsed.rows_per_batch} x {parsed.batches} rows a step"


def row(entry: Entry, columns: list[Column]) -> str:
    """Of one contestant; what went wrong stands in the first column."""
    title = CONTESTANTS[entry["contestant"]].title
    if entry["error"]:
        failure = f"**fails**: {entry['error'].splitlines()[0][:80]}"
        return as_row(title, [failure, *[""] * (len(columns) - 1)])
    return as_row(title, [column.cell(entry) for column in columns])


def as_row(first: str, others: list[str]) -> str:
    """In Markdown."""
    return f"| {' | '.join([first, *others])} |".replace("|  |", "| |")


def is_goal(entry: Entry) -> bool:
    """Whether it trains other rows than the others."""
    return CONTESTANTS[entry["contestant"]].family == GOAL


def ranged(values: dict[str, float] | None, form: str, unit: float = 1) -> str:
    """A median with its range.

    Example:
        >>> ranged({"median": 2, "min": 1, "max": 3}, "{:.1f}")
        '2.0 (1.0..3.0)'
    """
    if values is None:
        return ""
    median, low, high = (form.format(values[name] / unit) for name in ("median", "min", "max"))
    return median if low == high else f"{median} ({low}..{high})"
