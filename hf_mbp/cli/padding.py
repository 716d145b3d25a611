"""What padding cost a run, beside what it would have cost without splitting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

RESUMED_AT = "train_resumed_at_step"
"""Among the metrics of a run that was interrupted: what is counted and timed is of the steps after that one."""


@dataclass(frozen=True, kw_only=True)
class PaddingTotals:
    """Tokens and cells of a run, or of the steps after ``resumed_at``.

    ``unsplit_fraction`` is the padding of batches padded to their longest row.
    """

    tokens: float
    cells: float
    unsplit_fraction: float
    resumed_at: int = 0

    @classmethod
    def from_metrics(cls, metrics: Mapping[str, Any]) -> PaddingTotals | None:
        """Read the totals from the metrics that ``Trainer.train`` returns; ``None`` if nothing was counted."""
        cells = metrics.get("mbp_cells", 0)
        if not cells:
            return None
        return cls(
            tokens=metrics["mbp_tokens"],
            cells=cells,
            unsplit_fraction=metrics["mbp_padding_fraction_unsplit"],
            resumed_at=metrics.get(RESUMED_AT, 0),
        )

    @property
    def fraction(self) -> float:
        """Share of the cells that were padding."""
        return 1 - self.tokens / self.cells

    @property
    def unsplit_cells(self) -> float:
        """Cells that batches padded to their longest row would have had."""
        return self.tokens / (1 - self.unsplit_fraction)

    def __str__(self) -> str:
        run = f"padding {self.fraction:.1%} of {self.cells:,.0f} cells{part_of_run(self.resumed_at)}"
        unsplit = f"{self.unsplit_fraction:.1%} of {self.unsplit_cells:,.0f} cells"
        return f"{run}; padding every batch to its longest row would have cost {unsplit}".replace("%", " %")


def part_of_run(resumed_at: int) -> str:
    """What to add to a number that is of the steps after this one, and not of the whole run."""
    return f" after step {resumed_at:,}" if resumed_at else ""
