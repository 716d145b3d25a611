"""The line and the pictures at the end of a run."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from hf_mbp.cli.padding import PaddingTotals
from hf_mbp.cli.plots import _draw_steps, plot_loss, plot_padding

METRICS = {"mbp_tokens": 400_000, "mbp_cells": 412_345, "mbp_padding_fraction_unsplit": 0.41}
LOGS: list[dict[str, Any]] = [
    {"step": 2, "loss": 2.0, "mbp_tokens": 90, "mbp_cells": 100},
    {"step": 3, "loss": 1.5, "mbp_tokens": 50, "mbp_cells": 51},
    {"step": 3, "eval_loss": 1.4},
    {"step": 3, "train_loss": 1.7, **METRICS},  # the sum over the run: no step
]


def test_the_line() -> None:
    assert str(PaddingTotals.from_metrics(METRICS)) == (
        "padding 3.0 % of 412,345 cells; padding every batch to its longest row would have cost 41.0 % of 677,966 cells"
    )


def test_the_line_of_a_run_that_was_resumed() -> None:
    totals = PaddingTotals.from_metrics({**METRICS, "train_resumed_at_step": 1200})
    assert str(totals).startswith("padding 3.0 % of 412,345 cells after step 1,200; ")


def test_bars_of_a_run_that_was_resumed_cover_the_steps_that_were_counted() -> None:
    axes = Figure().add_subplot()
    _draw_steps(axes, [(10, 90, 100), (20, 40, 50)], resumed_at=15)
    tokens, padding = axes.containers
    assert [(bar.get_x(), bar.get_width(), bar.get_height()) for bar in tokens] == [(0, 10, 9), (15, 5, 8)]
    assert [bar.get_height() for bar in padding] == [1, 2]


def test_a_run_that_counted_nothing() -> None:
    assert PaddingTotals.from_metrics({"train_loss": 1.0}) is None
    assert PaddingTotals.from_metrics({"mbp_cells": 0}) is None


@pytest.mark.parametrize("before", [{}, {"eval_before_loss": 2.2}])
@pytest.mark.parametrize("logs", [LOGS, LOGS[:1], LOGS[2:3]])
def test_loss(tmp_path: Path, logs: list[dict[str, Any]], before: dict[str, float]) -> None:
    assert plot_loss(logs, before, tmp_path / "loss.png")
    assert_drawn(tmp_path / "loss.png")


def test_one_loss_is_drawn_of_the_evaluation_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mixtures of experts have another one in their metrics."""
    drawn: list[Figure] = []
    monkeypatch.setattr("hf_mbp.cli.plots._save", lambda figure, _: drawn.append(figure))
    assert plot_loss([], {"eval_before_aux_loss": 8.0, "eval_before_loss": 2.2}, tmp_path / "loss.png")
    (line,) = drawn[0].axes[0].get_lines()
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0], [2.2])


def test_padding(tmp_path: Path) -> None:
    assert plot_padding(LOGS, PaddingTotals.from_metrics(METRICS), tmp_path / "padding.png")
    assert_drawn(tmp_path / "padding.png")


def test_nothing_to_draw(tmp_path: Path) -> None:
    assert not plot_loss([], {}, tmp_path / "loss.png")
    assert not plot_padding(LOGS, None, tmp_path / "padding.png")
    assert not plot_padding([], PaddingTotals.from_metrics(METRICS), tmp_path / "padding.png")
    assert not list(tmp_path.glob("*.png"))


def assert_drawn(path: Path) -> None:
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 10
