"""Pictures of a run: its loss, and what padding cost it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_mbp.cli.padding import PaddingTotals, part_of_run

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Log = Mapping[str, Any]

# From the Okabe-Ito palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREY, _INK = "#0072B2", "#E69F00", "#999999", "#333333"
_DPI = 150


def plot_loss(logs: Iterable[Log], before: Log, path: Path) -> bool:
    """Draw training and evaluation loss over the optimizer steps; return whether there was anything to draw.

    ``logs`` is the Trainer's ``log_history``, ``before`` the metrics of the evaluation before training (may be empty).
    """
    logs = list(logs)
    train = [(log["step"], log["loss"]) for log in logs if "loss" in log]
    evaluation = [(0, before["eval_before_loss"])] if "eval_before_loss" in before else []
    evaluation += [(log["step"], log["eval_loss"]) for log in logs if "eval_loss" in log]
    if not train and not evaluation:
        return False
    figure, axes = _new_figure(1)
    if train:
        axes[0].plot(*zip(*train, strict=True), color=_BLUE, linewidth=1.6, marker="o", markersize=3, label="training")
    if evaluation:
        # a line between two points would claim to know what was between them
        style = "--" if len(evaluation) > 2 else "none"
        axes[0].plot(
            *zip(*evaluation, strict=True), color=_ORANGE, linewidth=1, linestyle=style, marker="s", label="evaluation"
        )
    axes[0].set(title="Loss", xlabel="optimizer step", ylabel="loss (nats)")
    axes[0].legend(frameon=False)
    _whole_steps(axes[0])
    _save(figure, path)
    return True


def plot_padding(logs: Iterable[Log], totals: PaddingTotals | None, path: Path) -> bool:
    """Draw cells used and wasted between log lines, and the run's total beside that of unsplit batches.

    Returns whether there was anything to draw.
    """
    steps = [(log["step"], log["mbp_tokens"], log["mbp_cells"]) for log in logs if "loss" in log and "mbp_cells" in log]
    if not steps or totals is None:
        return False
    figure, axes = _new_figure(2)
    _draw_steps(axes[0], steps, totals.resumed_at)
    _draw_totals(axes[1], totals)
    _save(figure, path)
    return True


def _draw_steps(axes: Axes, steps: list[tuple[int, float, float]], resumed_at: int) -> None:
    ends = [end for end, _, _ in steps]
    # what was counted between the last log line and an interruption is lost
    starts = [resumed_at if start < resumed_at < end else start for start, end in pairwise([0, *ends])]
    widths = [end - start for start, end in zip(starts, ends, strict=True)]
    # a bar covers the steps that its log line sums up, and shows their mean
    per_step = [(tokens / width, cells / width) for (_, tokens, cells), width in zip(steps, widths, strict=True)]
    used, wasted = [t for t, _ in per_step], [c - t for t, c in per_step]
    axes.bar(starts, used, width=widths, align="edge", color=_BLUE, edgecolor="white", linewidth=0.4, label="tokens")
    axes.bar(
        starts,
        wasted,
        width=widths,
        align="edge",
        bottom=used,
        color=_ORANGE,
        edgecolor="white",
        linewidth=0.4,
        label="padding",
    )
    axes.set(title="Cells of each step", xlabel="optimizer step", ylabel="cells a step", xlim=(0, ends[-1]))
    axes.margins(y=0.25)  # room for the legend
    axes.legend(frameon=False, loc="upper right", ncols=2)
    _thousands(axes)


def _draw_totals(axes: Axes, totals: PaddingTotals) -> None:
    cells = [totals.cells, totals.unsplit_cells]
    names = ["this run\n(micro-batches)", "each batch padded\nto its longest row"]
    axes.bar(names, [totals.tokens] * 2, width=0.55, color=_BLUE)
    axes.bar(names, [c - totals.tokens for c in cells], width=0.55, bottom=[totals.tokens] * 2, color=_ORANGE)
    for x, (total, fraction) in enumerate(zip(cells, (totals.fraction, totals.unsplit_fraction), strict=True)):
        axes.annotate(
            f"{fraction:.1%} padding".replace("%", " %"),
            (x, total),
            xytext=(0, 4),
            textcoords="offset points",
            ha="center",
            color=_INK,
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},  # or a grid line goes through it
        )
    axes.set(title=f"Cells{part_of_run(totals.resumed_at) or ' of the whole run'}", ylabel="cells")
    axes.margins(y=0.12)
    _thousands(axes)


def _new_figure(columns: int) -> tuple[Figure, list[Axes]]:
    # imported here: a second that only a run that draws should pay
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4 if columns == 1 else 10.5, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(1, columns, i + 1) for i in range(columns)]
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color=_GREY, alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
    return figure, axes


def _whole_steps(axes: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _thousands(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI)
