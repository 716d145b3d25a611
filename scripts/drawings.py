"""Draws how a step is run and how its plan is chosen, for docs/how_it_works.md.

    python scripts/drawings.py                  writes docs/step.png and docs/planner.png

Nothing is trained: the rows are 64 of the benchmark's workload `lognormal`, plans and costs are the planner's, for a
BERT of 6 layers and 384 hidden units on a CPU.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from benchmarks.sizes import SIZES
from benchmarks.workloads import WORKLOADS
from hf_mbp.arrays import Ints
from hf_mbp.plan import Budget, Cost, plan_rows
from hf_mbp.sizing import cost_of
from readme_figures import BLUE, ORANGE, ROWS, draw

DOCS = Path(__file__).resolve().parents[1] / "docs"
GREY, RED = "#999999", "#D55E00"


def planned_cost() -> Cost:
    """The planner's cost of the model."""
    with torch.device("meta"):
        return cost_of(SIZES["minilm"].model(is_language_model=False), torch.device("cpu"))


def draw_step(lengths: Ints, cost: Cost, path: Path) -> None:
    """Rows as they are read, as they are cut, and the share by which each micro-batch counts."""
    groups = plan_rows(lengths[:, None], Budget(), cost)
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    read, cut, shares = figure.subplots(1, 3, sharey=True)
    read.barh(np.arange(len(lengths)) + 0.5, lengths, height=1.0, color=BLUE)
    read.set(title="1. Rows of a step, as they are read", xlabel="tokens", ylabel="rows")
    read.spines[["top", "right"]].set_visible(False)
    draw(cut, groups, lengths)
    cut.set_title(f"2. Sorted, cut into {len(groups)} micro-batches")
    draw_shares(shares, [len(group) for group in groups])
    read.margins(y=0)
    read.invert_yaxis()
    for axes in (read, cut, shares):
        axes.title.set_fontsize(10.5)
    figure.suptitle("4. The sum is the gradient of all rows: one step of the optimizer", y=-0.02, fontsize=10.5)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_shares(axes: Axes, items: list[int]) -> None:
    """A bar for each micro-batch, at the height of its rows."""
    ends = np.cumsum(items)
    shares = np.array(items) / ends[-1]
    axes.barh(ends - np.array(items) / 2, shares, height=np.array(items) - 0.6, color=GREY)
    for end, count, share in zip(ends, items, shares, strict=True):
        axes.text(share + 0.004, end - count / 2, f"{count}/{ends[-1]}", va="center", fontsize=8)
    axes.set(title="3. Run in turn: mean loss x share", xlabel="share of the items (here: rows)")
    axes.set_xlim(0, shares.max() * 1.25)
    axes.margins(y=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.spines[["top", "right"]].set_visible(False)


def times_by_number(lengths: Ints, cost: Cost) -> tuple[list[int], list[list[float]]]:
    """Numbers of micro-batches; and what the best plan of so many takes for tokens, padding, attention and overhead."""
    without_overhead = Cost(overhead=0, attention=cost.attention)
    numbers, parts = list(range(1, len(lengths) + 1)), []
    for number in numbers:
        groups = plan_rows(lengths[:, None], Budget(), without_overhead, num_micro_batches=number)
        rows = np.array([len(group) for group in groups])
        width = np.array([lengths[group].max() for group in groups])
        cells, tokens = int((rows * width).sum()), int(lengths.sum())
        attention = float((cost.attention * rows * width**2).sum())
        parts.append([tokens, cells - tokens, attention, number * cost.overhead])
    return numbers, parts


def draw_planner(lengths: Ints, cost: Cost, path: Path) -> None:
    """What plans of each number of micro-batches take, and the one that is chosen."""
    numbers, parts = times_by_number(lengths, cost)
    total = np.array(parts).sum(axis=1)
    chosen = len(plan_rows(lengths[:, None], Budget(), cost))
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    axes = figure.subplots()
    below = np.zeros(len(numbers))
    for name, colour, part in zip(
        ("tokens", "padding", "attention", "overhead of micro-batches"),
        (BLUE, ORANGE, "#56B4E9", GREY),
        np.array(parts).T,
        strict=True,
    ):
        axes.fill_between(numbers, below, below + part, color=colour, label=name, linewidth=0)
        below = below + part
    axes.plot([chosen], [total[chosen - 1]], marker="o", color=RED)
    axes.annotate(
        f"{chosen} micro-batches", (chosen, total[chosen - 1]), xytext=(8, 14), textcoords="offset points", color=RED
    )
    axes.set(xlabel="micro-batches", ylabel="modelled time (cells)", xlim=(1, len(lengths)), ylim=(0, None))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.legend(frameon=False, loc="upper right", ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Writes both."""
    lengths = np.array(WORKLOADS["lognormal"].lengths()[:ROWS])
    cost = planned_cost()
    draw_step(lengths, cost, DOCS / "step.png")
    draw_planner(lengths, cost, DOCS / "planner.png")


if __name__ == "__main__":
    main()
