"""What a plan says, in lines."""

from __future__ import annotations

import numpy as np
import torch

from hf_mbp.byte_sizes import format_bytes
from hf_mbp.cli.plan_groups import Group
from hf_mbp.cli.run_plan import RunPlan
from hf_mbp.estimate import MemoryEstimate


def as_text(plan: RunPlan, device: torch.device) -> str:
    """Return what would happen, a line for each thing."""
    percentiles = np.percentile(plan.lengths, (5, 25, 50, 75, 95, 99, 100)).round().astype(int)
    named = zip(("5 %", "25 %", "median", "75 %", "95 %", "99 %", "longest"), percentiles, strict=True)
    first, groups = plan.steps[0], plan.groups()
    limit = plan.memory.limit_bytes
    lines = {
        "tokens a row": ", ".join(f"{name} {value:,}" for name, value in named),
        "optimizer steps": f"{plan.num_steps:,}" + _planned_part(plan),
        "budget": f"at most {_tokens(plan, plan.largest[0].width)} tokens a micro-batch, in rows of "
        f"{plan.largest[0].width:,}; for {device}" + ("" if limit is None else f", {format_bytes(limit)}"),
        "first step": f"{sum(group.rows for group in first.split):,} rows in {len(first.split):,} micro-batches; "
        f"{len(groups) / len(plan.steps):.1f} on average",
        "padding": f"{plan.padding():.1%} of the cells; {plan.padding(plain=True):.1%} with the plain Trainer",
        "modelled speed": f"{plan.speedup:.2f} x that of the plain Trainer with the same batch, if that fits",
        "largest micro-batch": _peak_line(plan.largest, limit),
        "plain Trainer": _peak_line(plan.largest_plain, limit),
    }
    return "\n".join(f"{name:<20} {text}" for name, text in lines.items()).replace("%", " %").replace("  %", " %")


def _planned_part(plan: RunPlan) -> str:
    return "" if len(plan.steps) == plan.num_steps else f"; {len(plan.steps):,} of them are planned here"


def _tokens(plan: RunPlan, width: int) -> str:
    return f"{plan.budget.tokens_at(width):,}"


def _peak_line(largest: tuple[Group, MemoryEstimate], limit: int | None) -> str:
    group, estimate = largest
    line = f"{group.rows:,} rows x {group.width:,} tokens, predicted peak {format_bytes(estimate.peak_bytes)}"
    if limit is None:
        return line
    verdict = "fits" if estimate.peak_bytes <= limit else "does NOT fit"
    return f"{line}: {verdict} {format_bytes(limit)}"
