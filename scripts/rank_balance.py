"""Simulates how long ranks wait for each other, before and after rows are dealt to them by their cost.

    python scripts/rank_balance.py               print the table; takes a minute
    python scripts/rank_balance.py --write       and put it into docs/distributed.md
    python scripts/rank_balance.py --many        print from where on runs are worse than turns

Nothing is trained: costs are those of the planner, for a BERT of 6 layers and 384 hidden units, in micro-batches that
are planned as in training, equally many on all ranks; the missing ones run with a few tokens at weight zero. 16 rows
for each rank and step, lengths lognormal(4.2, 0.8), clipped to 8..512.
"""

import argparse
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import BertConfig, BertForSequenceClassification

from hf_mbp import filler
from hf_mbp.arrays import Ints
from hf_mbp.balance import deal, in_runs, in_turns, row_costs
from hf_mbp.plan import Budget, Cost, plan_rows
from hf_mbp.sizing import cost_of
from marked_table import put_table

PAGE = Path(__file__).parents[1] / "docs" / "distributed.md"

ROWS, STEPS, MAX_TOKENS = 16, 50, 8192
MANY_STEPS = 8
RANKS = (2, 4, 8, 64)
DEVICES = {"cuda": "GPU", "cpu": "CPU"}

HEADER = (
    "| device | ranks | before: after each / ideal | once / ideal | after: after each / ideal | once / ideal "
    "| time of a step, after each | once |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"
)


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """Modelled time of steps, in cells: `after_each` where ranks wait for each other after each micro-batch (FSDP,
    ZeRO), `once` where they do so at the end of a step (DDP), `ideal` if none had to wait: the mean over the ranks."""

    after_each: float
    once: float
    ideal: float


def cost_on(device: str) -> Cost:
    """The planner's cost of the model, on a kind of device."""
    with torch.device("meta"):
        config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
        return cost_of(BertForSequenceClassification(config), torch.device(device))


def steps_of(num_ranks: int, num_steps: int, rows: int = ROWS) -> Iterator[Ints]:
    """Lengths of the rows of each step, of all ranks."""
    generator = np.random.default_rng(0)
    for _ in range(num_steps):
        yield np.clip(np.rint(generator.lognormal(4.2, 0.8, rows * num_ranks)), 8, 512).astype(np.int64)


def waiting(ranks: list[Ints], cost: Cost, max_tokens: int = MAX_TOKENS) -> Waiting:
    """Of a step, from the lengths of the rows of each rank."""
    plans = [plan_rows(lengths[:, None], Budget(max_tokens=max_tokens), cost) for lengths in ranks]
    agreed = max(map(len, plans))
    costs = np.array([_costs(lengths, agreed, cost, max_tokens) for lengths in ranks])
    each = costs.sum(axis=1)
    return Waiting(after_each=float(costs.max(axis=0).sum()), once=float(each.max()), ideal=float(each.mean()))


def _costs(lengths: Ints, agreed: int, cost: Cost, max_tokens: int) -> list[float]:
    """Of the micro-batches of a rank, as many as ranks have agreed on."""
    budget = Budget(max_tokens=max_tokens)
    plan = plan_rows(lengths[:, None], budget, cost)
    if len(plan) < agreed:
        plan = plan_rows(lengths[:, None], budget, cost, num_micro_batches=min(agreed, len(lengths)))
    shapes = [(len(group), int(lengths[group].max())) for group in plan]
    shapes += [(filler.ROWS, min(filler.WIDTH, shapes[-1][1]))] * (agreed - len(shapes))
    return [float(cost(np.int64(rows), np.int64(width))) for rows, width in shapes]


def total(steps: list[Waiting]) -> Waiting:
    """Of all steps together."""
    means = {name: statistics.fmean(getattr(step, name) for step in steps) for name in ("after_each", "once", "ideal")}
    return Waiting(**means)


def compared(num_ranks: int, cost: Cost, *, in_lockstep: bool, num_steps: int = STEPS) -> tuple[Waiting, Waiting]:
    """Before, with the rows of the data loader in their order, and after, with the same rows dealt by their cost."""
    before, after = [], []
    for lengths in steps_of(num_ranks, num_steps):
        dealt = deal(lengths, num_ranks, cost, in_lockstep=in_lockstep)
        before.append(waiting(np.split(lengths, num_ranks), cost))
        after.append(waiting([lengths[rows] for rows in dealt], cost))
    return total(before), total(after)


def line(device: str, num_ranks: int, num_steps: int = STEPS) -> str:
    """A line of the table; rows are dealt in the way that suits how ranks wait."""
    cost = cost_on(device)
    before, each = compared(num_ranks, cost, in_lockstep=True, num_steps=num_steps)
    _, once = compared(num_ranks, cost, in_lockstep=False, num_steps=num_steps)
    columns = [
        f"{before.after_each / before.ideal:.2f}",
        f"{before.once / before.ideal:.2f}",
        f"{each.after_each / each.ideal:.2f}",
        f"{once.once / once.ideal:.2f}",
        f"{each.after_each / before.after_each - 1:+.0%}",
        f"{once.once / before.once - 1:+.0%}",
    ]
    return f"| {DEVICES[device]} | {num_ranks} | {' | '.join(columns)} |"


TIMES = (5, 10, 15, 20, 25, 30, 50, 100)
"""How often the rows of a rank cost as much as the overhead of a micro-batch."""

MANY_SHAPES = ((16, 8), (64, 8), (16, 64), (64, 64))
"""Rows for each rank, ranks."""

MANY_HEADER = (
    "rows cost (overheads) | runs / turns, after each: "
    + ", ".join(f"{rows} x {ranks}" for rows, ranks in MANY_SHAPES)
    + " | once: the same"
)


def many_line(times: float, num_steps: int = MANY_STEPS) -> str:
    """How long steps take if rows are dealt in runs, over how long if in turns."""
    ratios = [runs_over_turns(times, rows, ranks, num_steps) for rows, ranks in MANY_SHAPES]
    columns = [" ".join(f"{ratio:.2f}" for ratio in way) for way in zip(*ratios, strict=True)]
    return f"{times:3} | {' | '.join(columns)}"


def runs_over_turns(times: float, rows: int, num_ranks: int, num_steps: int) -> tuple[float, float]:
    """Where ranks wait for each other after each micro-batch, and once a step."""
    ways: tuple[list[Waiting], list[Waiting]] = ([], [])
    for lengths in steps_of(num_ranks, num_steps, rows):
        lengths = np.sort(lengths)[::-1]
        costs = row_costs(lengths, Cost())
        cost = Cost(overhead=sum(costs) / num_ranks / times)
        for way, dealt in zip(ways, (in_runs(costs, num_ranks), in_turns(len(costs), num_ranks)), strict=True):
            way.append(waiting([lengths[dealt == rank] for rank in range(num_ranks)], cost))
    runs, turns = map(total, ways)
    return runs.after_each / turns.after_each, runs.once / turns.once


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/distributed.md")
    parser.add_argument("--many", action="store_true", help="compare the two ways to deal instead")
    options = parser.parse_args()
    if options.many:
        print("\n".join([MANY_HEADER, *(many_line(times) for times in TIMES)]))
        return
    lines = [line(device, num_ranks) for device in DEVICES for num_ranks in RANKS]
    table = "\n".join([HEADER, *lines])
    print(table)
    if options.write:
        put_table(PAGE, "balance", table)


if __name__ == "__main__":
    main()
