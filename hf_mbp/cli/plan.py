"""Show how a recipe would train, before it does: lengths, micro-batches, padding, memory; without weights or device."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from hf_mbp import memory
from hf_mbp.cli.arguments import ModelArguments, ModelShape
from hf_mbp.cli.command import run_command
from hf_mbp.cli.data import load_splits
from hf_mbp.cli.errors import (
    EXIT_CODE,
    UserError,
    say,
    user_errors,
)
from hf_mbp.cli.help import option_sections
from hf_mbp.cli.images import PIXELS
from hf_mbp.cli.models import load_config
from hf_mbp.cli.recipe import Recipe, read_recipe
from hf_mbp.cli.tasks import find_task, load_processor
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tokenization import column_lengths, row_lengths
from hf_mbp.collate import has_targets
from hf_mbp.estimate import MemoryEstimate, estimate_memory
from hf_mbp.fit import SAFETY, fit_budget
from hf_mbp.plan import Budget, Cost, Ints, as_sizes, plan_rows
from hf_mbp.sizing import cost_of, probe_shapes

MOST_STEPS = 500
"""Steps that are planned at most; with more, what is said of the run is said of these."""

_INTRODUCTION = f"""\
usage: hf-mbp plan RECIPE.yaml [--steps 3] [--output plan.png] [--device cuda] [--option value ...]

Show how a recipe would train, before it does: the lengths of its rows, the micro-batches of a few steps with what is
wasted on padding, and the predicted memory. Needs neither the weights of the model nor the device.

  hf-mbp plan recipes/text_classification/spam.yaml
  hf-mbp plan my.yaml --device cuda --memory_limit 24GiB --bf16

The exit code is {EXIT_CODE} after a mistake in the recipe or the options.

plan
  --steps                   steps to draw [3]
  --output                  where to draw them [plan.png]
  --device                  what to plan for, cpu or cuda; it need not be there [the one that is]"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is this script's own."""

    steps: int
    output: Path
    device: torch.device


@dataclass(frozen=True, kw_only=True)
class Group:
    """A micro-batch: the lengths of its rows, the longest first, and what they are padded to.

    A row of an encoder-decoder has two parts, source and target, each with a width of its own; its length is the sum.
    """

    lengths: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def rows(self) -> int:
        """How many."""
        return len(self.lengths)

    @property
    def width(self) -> int:
        """What the rows are padded to, all parts together."""
        return sum(self.widths)

    @property
    def cells(self) -> int:
        """Padded tokens."""
        return self.rows * self.width

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return sum(self.lengths)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The rows of one optimizer step, as micro-batches and as the plain Trainer has them: in the batches read."""

    split: tuple[Group, ...]
    plain: tuple[Group, ...]


@dataclass(frozen=True, kw_only=True)
class MemoryModel:
    """Predicts the peak of micro-batches: what is always there, and `fit` for activations; `limit_bytes` caps it."""

    resident_bytes: int
    fit: Budget
    limit_bytes: int | None

    def peak(self, group: Group) -> float:
        """Bytes, without the reserve that the budget holds back for what no prediction sees."""
        return self.resident_bytes + float(self.fit.bytes(group.rows, group.width)) / SAFETY


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """What would happen."""

    lengths: Ints
    num_steps: int
    steps: tuple[StepPlan, ...]
    budget: Budget
    cost: Cost
    memory: MemoryModel
    largest: tuple[Group, MemoryEstimate]
    largest_plain: tuple[Group, MemoryEstimate]

    def groups(self, *, plain: bool = False) -> list[Group]:
        """The micro-batches of all steps."""
        return [group for step in self.steps for group in (step.plain if plain else step.split)]

    def padding(self, *, plain: bool = False) -> float:
        """Share of the cells that are padding."""
        groups = self.groups(plain=plain)
        return 1 - sum(group.tokens for group in groups) / sum(group.cells for group in groups)

    def modelled_time(self, *, plain: bool = False) -> float:
        """By the cost model of the planner, in its unit."""
        groups = self.groups(plain=plain)
        rows, widths = np.array([group.rows for group in groups]), np.array([group.width for group in groups])
        return float(self.cost(rows, widths).sum())

    @property
    def speedup(self) -> float:
        """How much less time micro-batches are modelled to take than the plain Trainer's batches."""
        return self.modelled_time(plain=True) / self.modelled_time()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argv, lambda _: "\n\n".join((_INTRODUCTION, *option_sections())), _plan)


def _plan(argv: Sequence[str]) -> None:
    options, rest = _take_options(argv)
    recipe = read_recipe(rest)
    plan = plan_run(recipe, options.device)
    say(as_text(plan, options.device))
    if find_spec("matplotlib") is None:
        say("matplotlib is not installed, so nothing is drawn; pip install 'hf-mbp[recipes]' brings it")
        return
    from hf_mbp.cli.plan_plot import plot_plan

    with user_errors(f"--output {options.output}"):
        plot_plan(plan, options.steps, options.output)
    say(f"drawn in {options.output}")


def _take_options(argv: Sequence[str]) -> tuple[Options, list[str]]:
    """The options that are this script's own, and the others."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--steps", default="3")
    parser.add_argument("--output", default="plan.png")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    with user_errors("command line", argparse.ArgumentError):
        known, rest = parser.parse_known_args(list(argv))
    if not known.steps.isdecimal() or int(known.steps) < 1:
        raise UserError(f"command line: --steps is {known.steps!r}; write a whole number from 1, such as 3")
    if known.device not in ("cpu", "cuda"):
        raise UserError(f"command line: --device is {known.device!r}; write cpu or cuda")
    output = Path(known.output)
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise UserError(f"command line: --output is {known.output!r}; write a name that ends in .png, .pdf or .svg")
    return Options(steps=int(known.steps), output=output, device=torch.device(known.device)), rest


def plan_run(recipe: Recipe, device: torch.device) -> RunPlan:
    """Tokenize the recipe's rows, make its model without weights, and plan the steps of training.

    Which rows meet in a step is drawn at random: the padding is that of the run, the rows are others.

    Raises:
        UserError: data or model cannot be loaded, or the model does not fit the limit.
    """
    return plan_of(recipe, device, set_up(recipe))


def plan_of(recipe: Recipe, device: torch.device, setup: TaskSetup) -> RunPlan:
    """`plan_run` for a model without weights and rows that are there already."""
    sizes = row_sizes(recipe, setup)
    lengths = sizes.sum(axis=1)
    batch, accumulated = recipe.train.per_device_train_batch_size, recipe.train.gradient_accumulation_steps
    estimator = _Estimator(recipe=recipe, setup=setup, device=device)
    limit = _limit_bytes(recipe, device)
    fitted = estimator.memory_model(sizes[lengths.argmax()], limit)
    budget = _budget(recipe, fitted)
    cost = cost_of(setup.model, device)
    num_steps = _num_steps(recipe, len(lengths))
    batches = _draw_batches(sizes, batch, min(num_steps, MOST_STEPS) * accumulated, recipe.train.seed)
    pools = [batches[i : i + accumulated] for i in range(0, len(batches), accumulated)]
    steps = tuple(
        StepPlan(split=_split(np.concatenate(pool), budget, cost), plain=tuple(_group(part) for part in pool))
        for pool in pools
    )
    largest = max((group for step in steps for group in step.split), key=fitted.peak)
    largest_plain = max((group for step in steps for group in step.plain), key=fitted.peak)
    return RunPlan(
        lengths=lengths,
        num_steps=num_steps,
        steps=steps,
        budget=budget,
        cost=cost,
        memory=fitted,
        largest=(largest, estimator.estimate(largest.rows, largest.widths)),
        largest_plain=(largest_plain, estimator.estimate(largest_plain.rows, largest_plain.widths)),
    )


def set_up(recipe: Recipe) -> TaskSetup:
    """What the task makes of model and data, but without weights."""
    prepare_task = find_task(recipe.run.task)
    shape = without_weights(recipe.model)
    config = load_config(shape)
    processor = load_processor(recipe.run.task, shape, config)
    splits = load_splits(recipe.data, recipe.folder, recipe.train.seed)
    return prepare_task(splits, processor, config, shape, recipe.data)


def without_weights(model: ModelArguments) -> ModelShape:
    """The arguments for the same model without its weights."""
    return ModelShape(**{field.name: getattr(model, field.name) for field in fields(model)})


def row_sizes(recipe: Recipe, setup: TaskSetup) -> Ints:
    """Tokens of each row that the trainer will have, `[rows, parts]`; an image counts as one.

    Source and target of an encoder-decoder are two parts. Packed rows are those that the trainer will put together.
    """
    rows = setup.train
    if PIXELS in rows.column_names:
        return np.ones((len(rows), 1), dtype=np.int64)
    if getattr(recipe.train, "packing", False):
        from trl import pack_dataset

        rows = pack_dataset(rows, recipe.data.max_length, recipe.train.packing_strategy)
    lengths = row_lengths(rows)
    if not (has_targets(setup.model) and isinstance(rows[0]["labels"], list)):
        return as_sizes(lengths)
    return as_sizes(list(zip(lengths, column_lengths(rows, "labels"), strict=True)))


@dataclass(frozen=True, kw_only=True)
class _Estimator:
    """Estimates the memory of micro-batches under the options of a recipe."""

    recipe: Recipe
    setup: TaskSetup
    device: torch.device

    def estimate(self, rows: int, widths: Sequence[int]) -> MemoryEstimate:
        """Of so many rows of the data set; a pair is as wide as both its sides together."""
        train, each = self.recipe.train, self.setup.rows_each
        with user_errors("the memory cannot be predicted", (ValueError, ImportError)):
            estimate = estimate_memory(
                self.setup.model_with_loss or self.setup.model,
                rows * each,
                math.ceil(widths[0] / each),
                optimizer=str(getattr(train.optim, "value", train.optim)),
                bf16=bool(train.bf16),
                fp16=bool(train.fp16),
                gradient_checkpointing=bool(train.gradient_checkpointing),
                attn_implementation=self.recipe.model.attn_implementation,
                target_width=widths[1] if len(widths) > 1 else None,
                inputs=self.setup.inputs_of,
                device=self.device.type,
            )
        return replace(
            estimate,
            parameter_bytes=estimate.parameter_bytes + self._reference_bytes,
            fixed_bytes=estimate.fixed_bytes + self._process_bytes,
        )

    @cached_property
    def _process_bytes(self) -> int:
        return _process_bytes(self.device)

    @cached_property
    def _reference_bytes(self) -> int:
        """Of a second model that is kept during training."""
        if self.setup.reference is None or getattr(self.recipe.train, "precompute_ref_log_probs", False):
            return 0
        model = self.setup.reference()
        return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))

    def memory_model(self, longest: Ints, limit: int | None) -> MemoryModel:
        """Fitted as a run fits it: to a few small micro-batches, of the longest row, its parts cut in proportion."""
        length = int(longest.sum())
        shapes, _ = probe_shapes(length, is_cut=length > 1)
        cut = [(rows, tuple(max(1, round(part * width / length)) for part in longest)) for rows, width in shapes]
        estimates = [self.estimate(rows, widths) for rows, widths in cut]
        resident = max(estimate.resident_bytes for estimate in estimates)
        if limit is not None and limit <= resident:
            raise UserError(
                f"memory_limit is {memory.format_bytes(limit)}, but weights, gradients, optimizer states and libraries "
                f"alone take {memory.format_bytes(resident)}; raise it, or write another dtype, optim or model"
            )
        measured = [
            (rows, sum(widths), estimate.activation_bytes)
            for (rows, widths), estimate in zip(cut, estimates, strict=True)
        ]
        room = math.inf if limit is None else limit - resident
        fit = fit_budget(measured, 0)
        return MemoryModel(
            resident_bytes=resident,
            fit=replace(fit, max_bytes=room),
            limit_bytes=limit,
        )


def _limit_bytes(recipe: Recipe, device: torch.device) -> int | None:
    """Bytes that training may take in all; `None` if only a number of tokens is given."""
    limit = memory.parse_memory_limit(recipe.mbp.memory_limit)
    if isinstance(limit, int):
        return limit
    if limit is None and recipe.mbp.max_tokens_per_micro_batch is not None:
        return None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "there is no GPU here whose memory could be asked for; write the size of the one to plan for, such as "
            "--memory_limit 24GiB"
        )
    if limit is not None:
        return int(limit * memory.total_memory(device))
    return _process_bytes(device) + int(memory.DEFAULT_FRACTION * memory.free_memory(device))


def _process_bytes(device: torch.device) -> int:
    """What Python and its libraries hold: of a CPU's memory, which a limit counts, too."""
    return memory.used_memory(device) if device.type == "cpu" else 0


def _budget(recipe: Recipe, fitted: MemoryModel) -> Budget:
    max_tokens = recipe.mbp.max_tokens_per_micro_batch
    if fitted.limit_bytes is None:
        return Budget(max_tokens=max_tokens)
    return replace(fitted.fit, max_tokens=max_tokens)


def _num_steps(recipe: Recipe, num_rows: int) -> int:
    train = recipe.train
    if train.max_steps > 0:
        return int(train.max_steps)
    batches = num_rows / train.per_device_train_batch_size
    batches = max(1, math.floor(batches) if train.dataloader_drop_last else math.ceil(batches))
    steps: float = train.num_train_epochs * math.ceil(batches / train.gradient_accumulation_steps)
    return math.ceil(steps)


def _draw_batches(sizes: Ints, batch_size: int, most: int, seed: int) -> list[Ints]:
    """Random batches of rows' sizes, as an epoch gives them; more than an epoch has are not needed to tell."""
    order = np.random.default_rng(seed).permutation(len(sizes))
    cuts = range(0, len(order), batch_size)
    return [sizes[order[start : start + batch_size]] for start in cuts][:most]


def _split(sizes: Ints, budget: Budget, cost: Cost) -> tuple[Group, ...]:
    return tuple(_group(sizes[rows]) for rows in plan_rows(sizes, budget, cost))


def _group(sizes: Ints) -> Group:
    lengths: list[int] = sorted(sizes.sum(axis=1).tolist(), reverse=True)
    return Group(lengths=tuple(lengths), widths=tuple(sizes.max(axis=0).tolist()))


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
        f"{plan.largest[0].width:,}; for {device}" + ("" if limit is None else f", {memory.format_bytes(limit)}"),
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
    line = f"{group.rows:,} rows x {group.width:,} tokens, predicted peak {memory.format_bytes(estimate.peak_bytes)}"
    if limit is None:
        return line
    verdict = "fits" if estimate.peak_bytes <= limit else "does NOT fit"
    return f"{line}: {verdict} {memory.format_bytes(limit)}"
