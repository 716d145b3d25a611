"""Simulates what micro-batches of rows with two lengths take, by the order of the rows that is cut into groups.

    python scripts/pair_orders.py               print the two tables; takes a minute
    python scripts/pair_orders.py --write       and put them into docs/how_it_works.md

Nothing is trained: times are those of the planner, for T5-small, 16,384 tokens a micro-batch. The lengths of source and
target are drawn as in translation (lognormal, median 25, and as long but for a fifth), summarisation (median 400 and
55, hardly related), and independent of each other (median 67 each). Eight rows, of which a micro-batch costs as much as
one more row, are compared with all ways to group them.
"""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import T5Config, T5ForConditionalGeneration

from hf_mbp.arrays import Ints
from hf_mbp.cuts import SortedRows, best_cuts, time_of_cuts
from hf_mbp.orders import orders_of
from hf_mbp.plan import Budget, Cost, plan_rows
from hf_mbp.sizing import cost_of
from marked_table import put_table

PAGE = Path(__file__).parents[1] / "docs" / "how_it_works.md"

BUDGET = Budget(max_tokens=16384)
NUM_ROWS = (64, 512, 8192)
DEVICES = {"cuda": "GPU", "cpu": "CPU"}
ROWS_AT_LEAST = 1024
"""Of the simulated mini-batches together, so that few rows say as much as many."""

FEW_ROWS, TRIALS = 8, 40

HEADER = "| lengths | device | rows | longer part | curve | planned |\n| --- | --- | ---: | ---: | ---: | ---: |"
FEW_HEADER = "| lengths | order | mean over the best | worst | within 1 % |\n| --- | --- | ---: | ---: | ---: |"


def translation(random: np.random.Generator, count: int) -> Ints:
    """Sentences and their translations."""
    source = random.lognormal(3.2, 0.7, count)
    return clipped(source, source * random.lognormal(0.05, 0.2, count), 512)


def summarisation(random: np.random.Generator, count: int) -> Ints:
    """Texts, and summaries that are a little longer for longer ones."""
    source = random.lognormal(6.0, 0.6, count)
    return clipped(source, random.lognormal(4.0, 0.4, count) * (source / 400) ** 0.2, 1024)


def independent(random: np.random.Generator, count: int) -> Ints:
    """Pairs of texts that have nothing to do with each other."""
    return clipped(random.lognormal(4.2, 0.8, count), random.lognormal(4.2, 0.8, count), 512)


LENGTHS = {"translation": translation, "summarisation": summarisation, "independent": independent}


def clipped(source: np.ndarray, target: np.ndarray, longest: int) -> Ints:
    """Whole lengths, from 2 up to the longest."""
    return np.rint(np.clip(np.stack([source, target], axis=1), 2, longest)).astype(np.int64)


def cost_on(device: str) -> Cost:
    """The planner's cost of T5-small, on a kind of device."""
    with torch.device("meta"):
        return cost_of(T5ForConditionalGeneration(T5Config()), torch.device(device))


def by_sum(sizes: Ints) -> Ints:
    """The order to compare with."""
    return np.argsort(-sizes.sum(axis=1), kind="stable")


def fits(cost: Cost, rows: Ints, width: Ints) -> Any:
    """Whether the planner puts so many rows together."""
    return np.logical_and(BUDGET.fits(rows, width), cost.holds_for(rows, width))


def time_in_order(sizes: Ints, cost: Cost, order: Ints) -> float:
    """The least time of groups of neighbours."""
    rows = SortedRows(sizes=sizes[order], fits=partial(fits, cost), time_of_row=cost.of_row, floor=cost.floor)
    return time_of_cuts(rows, best_cuts(rows, cost.overhead), cost.overhead)


def time_planned(sizes: Ints, cost: Cost) -> float:
    """The time of the groups that training would run."""
    groups = plan_rows(sizes, BUDGET, cost)
    width = np.array([sizes[group].max(axis=0).sum() for group in groups])
    return float(cost(np.array([len(group) for group in groups]), width).sum())


def line(lengths: str, device: str, num_rows: int) -> str:
    """Of the first table: times in the place of those in the order of sums."""
    cost, random = cost_on(device), np.random.default_rng(0)
    mini_batches = [LENGTHS[lengths](random, num_rows) for _ in range(-(-ROWS_AT_LEAST // num_rows))]
    orders: list[Callable[[Ints], float]] = [
        lambda sizes: time_in_order(sizes, cost, by_sum(sizes)),
        lambda sizes: time_in_order(sizes, cost, np.lexsort((-sizes.sum(axis=1), -sizes.max(axis=1)))),
        lambda sizes: time_in_order(sizes, cost, orders_of(sizes)[-1]),
        partial(time_planned, cost=cost),
    ]
    first, *others = [sum(map(order, mini_batches)) for order in orders]
    columns = " | ".join(f"{time / first - 1:+.1%}" for time in others)
    return f"| {lengths} | {DEVICES[device]} | {num_rows:,} | {columns} |"


def least_time(sizes: Ints, cost: Cost) -> float:
    """Of all ways to put few rows into groups: that of a set is that of the group of its first row, and of the rest."""
    count, sets = len(sizes), np.arange(1 << len(sizes))
    members = sets[:, None] >> np.arange(count) & 1
    width = (members[:, :, None] * sizes).max(axis=1).sum(axis=1)
    allowed = BUDGET.fits(members.sum(axis=1), width) | (members.sum(axis=1) == 1)
    times = np.where(allowed, cost(members.sum(axis=1), width), np.inf)
    least = np.zeros(len(sets))
    for rows in sets[1:]:
        first = rows & -rows
        groups = sets[(sets & ~rows == 0) & (sets & first != 0)]
        least[rows] = (times[groups] + least[rows ^ groups]).min()
    return float(least[-1])


def few_lines(lengths: str, trials: int = TRIALS) -> list[str]:
    """Of the second table: how much dearer than the best the order of sums is, and what is planned."""
    excess = []
    for seed in range(trials):
        sizes = LENGTHS[lengths](np.random.default_rng(seed), FEW_ROWS)
        cost = Cost(overhead=float(sizes.sum(axis=1).mean()))
        times = [time_in_order(sizes, cost, by_sum(sizes)), time_planned(sizes, cost)]
        excess.append(np.array(times) / least_time(sizes, cost) - 1)
    return [
        f"| {lengths} | {name} | {over.mean():.2%} | {over.max():.1%} | {(over <= 0.01).mean():.0%} |"
        for name, over in zip(("the sum", "planned"), np.array(excess).T, strict=True)
    ]


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/how_it_works.md")
    options = parser.parse_args()
    lines = [line(lengths, device, rows) for lengths in LENGTHS for device in DEVICES for rows in NUM_ROWS]
    many = "\n".join([HEADER, *lines])
    few = "\n".join([FEW_HEADER, *(row for lengths in LENGTHS for row in few_lines(lengths))])
    print(f"{many}\n\n{few}")
    if options.write:
        put_table(PAGE, "pairs", many)
        put_table(PAGE, "few pairs", few)


if __name__ == "__main__":
    main()
