"""Makes what README.md shows of the benchmark: a picture of one step, and a short table.

    python scripts/readme_figures.py            writes docs/problem.png and the table in README.md

Both are of the workload `lognormal` with 64 rows a step: medians in docs/benchmark.json, which `scripts/benchmark.py`
has measured. The picture shows 64 of its rows.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.sizes import SIZES
from benchmarks.workloads import WORKLOADS
from hf_mbp.plan import Budget, plan_rows
from hf_mbp.sizing import cost_of
from marked_table import put_table

ROOT = Path(__file__).resolve().parents[1]
README, RESULTS, PICTURE = ROOT / "README.md", ROOT / "docs" / "benchmark.json", ROOT / "docs" / "problem.png"
BLUE, ORANGE = "#0072B2", "#E69F00"
ROWS = 64


ANY = "any"
"""Shape of what makes the same micro-batches in all of them: the mean of the medians."""

TABLE = (
    ("`Trainer`, 64 rows at once", "64x1", "trainer"),
    ("`Trainer`, 8 x 8 rows", "8x8", "trainer"),
    ("`Trainer` with `group_by_length`, 8 x 8", "8x8", "group_by_length"),
    ("`Trainer` with `batch_rebalance`, 8 x 8", "8x8", "batch_rebalance"),
    ("**`MBPTrainer`, 64 rows**", ANY, "mbp"),
    ("plain PyTorch with nothing padded: the limit", ANY, "limit"),
)
"""What it is called; and shape and contestant of the benchmark."""

HEADER = "| | useful tokens/s | padding | peak memory |\n| --- | ---: | ---: | ---: |"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Of one way to train, as text."""

    speed: str
    padding: str
    memory: str


def figures_of(summary: list[dict[str, Any]], shape: str, contestant: str) -> Figures:
    """What the benchmark says of it."""
    keys = {"workload": "lognormal", "contestant": contestant, **({} if shape == ANY else {"shape": shape})}
    found = [entry for entry in summary if keys.items() <= entry.items()]
    return Figures(
        speed=f"{fmean(entry['tokens_per_second']['median'] for entry in found):,.0f}",
        padding=f"{fmean(entry['padding_fraction'] for entry in found):.0%}",
        memory=f"{fmean(entry['peak_bytes']['median'] for entry in found) / 2**30:.1f} GiB",
    )


def table(summary: list[dict[str, Any]]) -> str:
    """The table of README.md."""
    lines = [HEADER]
    for name, shape, contestant in TABLE:
        figures = figures_of(summary, shape, contestant)
        lines.append(f"| {name} | {figures.speed} | {figures.padding} | {figures.memory} |")
    return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """A way to run the rows: the groups that are padded together, and its shape and name in the benchmark."""

    title: str
    groups: list[list[int]]
    shape: str
    contestant: str


def panels(lengths: np.ndarray) -> list[Panel]:
    """The three ways."""
    with torch.device("meta"):
        cost = cost_of(SIZES["minilm"].model(is_language_model=False), torch.device("cpu"))
    in_order = np.arange(ROWS)
    return [
        Panel(title="Trainer, 64 rows at once", groups=[in_order.tolist()], shape="64x1", contestant="trainer"),
        Panel(
            title="Trainer, 8 x 8 rows",
            groups=[part.tolist() for part in np.split(in_order, 8)],
            shape="8x8",
            contestant="trainer",
        ),
        Panel(
            title="MBPTrainer, 64 rows",
            groups=plan_rows(lengths[:, None], Budget(), cost),
            shape=ANY,
            contestant="mbp",
        ),
    ]


def draw(axes: Axes, groups: list[list[int]], lengths: np.ndarray) -> None:
    """Each row a bar as long as its tokens, on the padding of its group; white lines are between groups."""
    top = 0
    for group in groups:
        width, y = int(lengths[group].max()), np.arange(top, top + len(group)) + 0.5
        axes.barh(y, [width] * len(group), height=1.0, color=ORANGE, label="padding" if top == 0 else None)
        axes.barh(y, lengths[group], height=1.0, color=BLUE, label="tokens" if top == 0 else None)
        top += len(group)
        axes.plot([0, width], [top, top], color="white", linewidth=1.2, solid_capstyle="butt")
    axes.margins(0)
    axes.set_xlabel("tokens")
    axes.spines[["top", "right"]].set_visible(False)


def draw_panels(summary: list[dict[str, Any]], path: Path) -> None:
    """The picture."""
    lengths = np.array(WORKLOADS["lognormal"].lengths()[:ROWS])
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    every = figure.subplots(1, 3, sharex=True, sharey=True)
    for axes, panel in zip(every, panels(lengths), strict=True):
        draw(axes, panel.groups, lengths)
        figures = figures_of(summary, panel.shape, panel.contestant)
        measured = f"{figures.padding} padding, {figures.memory}\n{figures.speed} useful tokens a second"
        axes.set_title(f"{panel.title}\n{measured}", fontsize=11)
    every[0].invert_yaxis()
    every[0].set_ylabel("rows of a step")
    figure.legend(*every[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Writes both."""
    summary = json.loads(RESULTS.read_text(encoding="utf-8"))["summary"]
    draw_panels(summary, PICTURE)
    put_table(README, "figures", table(summary))


if __name__ == "__main__":
    main()
