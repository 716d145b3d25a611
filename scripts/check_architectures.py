"""Prints for which architectures and heads of transformers micro-batches are exact, and why not for the others.

    python scripts/check_architectures.py            print the table
    python scripts/check_architectures.py --write    and put it into docs/exactness.md

Tiny random models in float64, 16 rows of uneven lengths. The gradient of one step of MBPTrainer, in several
micro-batches, is compared with that of plain PyTorch on the whole batch; apart from that, check_equivalence is asked.
The exit code is 1 if the two do not agree.
"""

import argparse
import copy
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TrainerCallback, TrainingArguments

from architectures import CASES, Case
from hf_mbp import EquivalenceReport, MBPConfig, MBPTrainer, check_equivalence
from marked_table import put_table

PAGE = Path(__file__).parents[1] / "docs" / "exactness.md"

ROUNDING = 1e-5
"""Relative error up to which the step is exact: some heads compute losses, and some models norms, in float32."""


class GradientRecorder(TrainerCallback):
    """Keeps the gradients that the optimizer is about to use."""

    def on_pre_optimizer_step(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Called by the training loop."""
        self.gradients = gradients_of(model)


def gradients_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The gradient of each parameter that has one."""
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a case gave: the error of the step and the report of the check."""

    case: Case
    error: float
    num_micro_batches: int
    report: EquivalenceReport

    @property
    def is_exact(self) -> bool:
        """Whether the gradient of the step is that of the whole batch."""
        return self.error <= ROUNDING

    @property
    def agrees(self) -> bool:
        """Whether the check says so, too."""
        return self.is_exact == self.report.is_exact

    def row(self) -> str:
        """A row of the table. Rounding differs between machines, and is not shown."""
        error = f"< {ROUNDING:.0e}" if self.is_exact else f"{self.error:.1g}"
        why = " ".join(self.report.findings) or "-"
        check = "exact" if self.report.is_exact else "not exact"
        return f"| {self.case.architecture} | {self.case.head} | {error} | {check} | {_without_numbers(why)} |"


def _without_numbers(finding: str) -> str:
    """A finding without what it measured, which is about the rows and not about the architecture."""
    finding = re.sub(r" \(by .*?rows\)", "", finding)
    finding = re.sub(r": the first rows weigh as .*? are counted as [^.]*(?=\. )", "", finding)
    return finding.replace("|", "\\|")


def examine(case: Case) -> Outcome:
    """One step and one check of a case."""
    model = case.build()
    expected = whole_gradients(model, case)
    with tempfile.TemporaryDirectory() as folder:
        actual, num_micro_batches = split_gradients(copy.deepcopy(model), case, folder)
        report = check_equivalence(trainer_of(model, case, folder))
    if num_micro_batches < 2:
        raise RuntimeError(f"{case.name}: its rows were not split; lower its max_tokens.")
    return Outcome(case=case, error=distance(expected, actual), num_micro_batches=num_micro_batches, report=report)


def whole_gradients(model: torch.nn.Module, case: Case) -> dict[str, torch.Tensor]:
    """Plain PyTorch on all rows."""
    model = copy.deepcopy(model).train()
    model(**case.reference(case.collate(case.rows()))).loss.backward()
    return gradients_of(model)


def split_gradients(model: torch.nn.Module, case: Case, folder: str) -> tuple[dict[str, torch.Tensor], int]:
    """The gradients of a step of MBPTrainer, and how many micro-batches it had."""
    recorder = GradientRecorder()
    trainer = trainer_of(model, case, folder, callbacks=[recorder])
    trainer.train()
    return recorder.gradients, int(trainer.state.log_history[0]["mbp_micro_batches"])


def trainer_of(model: torch.nn.Module, case: Case, folder: str, **more: Any) -> MBPTrainer:
    """A trainer whose only step has all rows."""
    rows = case.rows()
    args = TrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=len(rows),
        max_steps=1,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
    )
    config = MBPConfig(max_tokens_per_micro_batch=case.max_tokens, check_at_start=False)
    return MBPTrainer(model=model, args=args, train_dataset=rows, data_collator=case.collate, mbp_config=config, **more)


def distance(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> float:
    """Norm of the difference of all gradients, over the norm of the expected ones."""
    if expected.keys() != actual.keys():
        return float("inf")
    difference = sum(float((expected[name] - actual[name]).double().pow(2).sum()) for name in expected)
    return float((difference / sum(float(value.double().pow(2).sum()) for value in expected.values())) ** 0.5)


HEADER = "| architecture | head | error of a step | check | why, and what to do |\n| --- | --- | ---: | --- | --- |"


def main() -> int:
    """Print the table; return 1 if step and check do not agree somewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/exactness.md")
    parser.add_argument("--only", default="", help="only architectures and heads whose name contains this")
    arguments = parser.parse_args()
    if arguments.write and arguments.only:
        parser.error("--write needs all rows: leave --only out")
    transformers.logging.set_verbosity_error()
    print(HEADER, flush=True)
    rows, wrong = [], []
    for case in CASES:
        if arguments.only.lower() in case.name.lower():
            outcome = examine(case)
            rows.append(outcome.row())
            print(rows[-1], flush=True)
            wrong += [] if outcome.agrees else [f"{case.name}: step {outcome.error:.1g}, check says {outcome.report}"]
    if arguments.write:
        put_table(PAGE, "architectures", "\n".join([HEADER, *rows]))
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
