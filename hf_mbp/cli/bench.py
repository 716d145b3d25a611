"""Measure a recipe's own steps with MBPTrainer and with the stock Trainer: useful tokens a second, padding, memory."""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback

from hf_mbp.byte_sizes import format_bytes
from hf_mbp.cli.command import run_command
from hf_mbp.cli.errors import MISTAKE, RunFailedError, UserError, say, shows_traceback, user_errors
from hf_mbp.cli.finetune import build_trainer
from hf_mbp.cli.recipe import Recipe, read_recipe
from hf_mbp.cli.training_arguments import TrainArguments
from hf_mbp.device_memory import peak_memory
from hf_mbp.out_of_memory import is_out_of_memory

CONTESTANTS = ("Trainer", "MBPTrainer")

_WITHOUT_STOCK = ("embedding", "preference_tuning")
"""Tasks whose loss the stock Trainer does not have."""

_KILLED = (-9, 137)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one contestant did in the steps that were timed; nothing, and why, if it could not."""

    name: str
    step_seconds: tuple[float, ...] = ()
    tokens: int = 0
    cells: int = 0
    passes: int = 0
    peak_bytes: int = 0
    failure: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding; rows, where rows are not of tokens."""
        return self.tokens / sum(self.step_seconds)


@dataclass(kw_only=True)
class Meter(TrainerCallback):
    """Counts in the model's forward passes, not what a trainer says of itself; from the end of the first step on."""

    device: torch.device
    ends: list[float] = field(default_factory=list)
    cells: int = 0
    passes: int = 0
    tokens: Any = 0

    def watch(self, model: torch.nn.Module) -> None:
        """Have forward passes counted."""
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model: torch.nn.Module, _args: Any, inputs: Mapping[str, Any]) -> None:
        if not self.ends:
            return
        mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
        cells = len(next(iter(inputs.values()))) if ids is None else ids.numel()  # images: their rows
        self.passes += 1
        self.cells += cells
        self.tokens = self.tokens + (cells if ids is None or mask is None else mask.sum())  # without waiting for it

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Note the time, once the device has done the step."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.ends.append(time.perf_counter())

    def result(self, name: str) -> Result:
        """Return what was counted."""
        return Result(
            name=name,
            step_seconds=tuple(after - before for before, after in zip(self.ends, self.ends[1:], strict=False)),
            tokens=int(self.tokens),
            cells=self.cells,
            passes=self.passes,
            peak_bytes=peak_memory(self.device),
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    return run_command(argv, _bench)


def _bench(argv: Sequence[str]) -> None:
    steps, one, rest = _take_options(argv)
    recipe = read_recipe(rest)
    if one is not None:
        contestant, _, file = one.partition(":")
        Path(file).write_text(json.dumps(asdict(measure(recipe, contestant, steps))), encoding="utf-8")
        return
    if recipe.run.task in _WITHOUT_STOCK:
        raise UserError(f"bench measures beside the stock Trainer, which has no loss for task {recipe.run.task}")
    if recipe.train.world_size > 1:
        raise UserError("bench measures one process; start it without a launcher")
    say(as_text([_in_own_process(name, argv) for name in CONTESTANTS], steps))


def _take_options(argv: Sequence[str]) -> tuple[int, str | None, list[str]]:
    """Steps, for the processes that this one starts whom to measure and where to write that; and the others."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.add_argument("--steps", default="5")
    parser.add_argument("--one")
    with user_errors("command line", argparse.ArgumentError):
        known, rest = parser.parse_known_args(list(argv))
    if not known.steps.isdecimal() or int(known.steps) < 1:
        raise UserError(f"command line: --steps is {known.steps!r}; write a whole number from 1, such as 5")
    return int(known.steps), known.one, rest


def _in_own_process(name: str, argv: Sequence[str]) -> Result:
    """Memory of one contestant would otherwise be there when the other is measured."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        command = [sys.executable, "-m", "hf_mbp.cli.bench", *argv, "--one", f"{name}:{file}", "--output_dir", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
        if file.is_file():
            return Result(**json.loads(file.read_text(encoding="utf-8")))
    if done.returncode in _KILLED:
        return Result(name=name, failure="was killed, most likely for its memory")
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    reason = told[-1].removeprefix("error: ") if told else f"ended with exit code {done.returncode}"
    if shows_traceback(argv):
        print(done.stderr, file=sys.stderr)
    kind = UserError if done.returncode == MISTAKE else RunFailedError
    raise kind(f"{name}: {reason}")


def measure(recipe: Recipe, name: str, steps: int) -> Result:
    """Train one step and then `steps` that are timed."""
    meter = Meter(device=recipe.train.device)
    _only_train(recipe.train, steps + 1)
    trainer = build_trainer(recipe)
    if name == "Trainer":
        trainer = Trainer(
            model=trainer.model,
            args=recipe.train,
            train_dataset=trainer.train_dataset,
            data_collator=trainer.data_collator,
            processing_class=trainer.processing_class,
        )
    trainer.add_callback(meter)
    meter.watch(trainer.model)
    try:
        trainer.train()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Result(name=name, failure="ran out of memory", peak_bytes=peak_memory(meter.device))
    return meter.result(name)


def _only_train(train: TrainArguments, steps: int) -> None:
    train.max_steps = steps
    train.eval_strategy = train.save_strategy = train.logging_strategy = "no"
    train.eval_on_start = False
    train.report_to, train.push_to_hub, train.load_best_model_at_end = [], False, False
    train.resume_from_checkpoint = None


def as_text(results: Sequence[Result], steps: int) -> str:
    """Return a table with a column for each contestant, and how much faster the last is than the first."""
    lines = [f"{steps} steps after a first one, one measurement", "", _line("", [result.name for result in results])]
    lines += [_line(title, [_cell(result, title) for result in results]) for title in _TITLES]
    lines += [f"{result.name} {result.failure}." for result in results if result.failure]
    if all(result.failure is None for result in results):
        first, last = results
        ratio = last.tokens_per_second / first.tokens_per_second
        lines += ["", f"{last.name} does {ratio:.2f} x the useful work of {first.name} in the same time."]
        if first.tokens != last.tokens:
            lines.append(f"They had other rows ({first.tokens:,} and {last.tokens:,} tokens), so read this with care.")
    return "\n".join(lines)


_TITLES = ("useful tokens a second", "seconds a step (median)", "padding", "passes a step", "peak memory")


def _cell(result: Result, title: str) -> str:
    if result.failure is not None:
        return format_bytes(result.peak_bytes) if title == "peak memory" and result.peak_bytes else "-"
    values = (
        f"{result.tokens_per_second:,.0f}",
        f"{statistics.median(result.step_seconds):.3g}",
        f"{1 - result.tokens / result.cells:.1%}".replace("%", " %"),
        f"{result.passes / len(result.step_seconds):.3g}",
        format_bytes(result.peak_bytes),
    )
    return dict(zip(_TITLES, values, strict=True))[title]


def _line(title: str, cells: Sequence[str]) -> str:
    return f"{title:<26}" + "".join(f"{cell:>14}" for cell in cells)


if __name__ == "__main__":
    sys.exit(main())
