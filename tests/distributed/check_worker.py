"""Run by several processes: the check of a model that FSDP2 shards; saves what it says and leaves, per rank."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import BertForSequenceClassification

from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.equivalence import EquivalenceReport, InexactError, compare
from tests.distributed.case_worker import arguments_of, assert_distributed, weights_of
from tests.distributed.cases import Case
from tests.distributed.ending import leave
from tests.helpers import Pad, bert_config, build, token_rows, with_labels
from tests.test_check import ClassWeighted

CASE = Case(strategy="fsdp2")


def trainer_of(folder: Path, *, trainer_class: type[MBPTrainer] = MBPTrainer, **options: Any) -> MBPTrainer:
    """Trains a classifier with dropout on rows of three classes."""
    return trainer_class(
        build(BertForSequenceClassification, bert_config(num_labels=3, hidden_dropout_prob=0.2)),
        arguments_of(CASE, folder, max_steps=2),
        train_dataset=with_labels(token_rows(24), lambda index, row: index % 3),
        data_collator=Pad(),
        mbp_config=MBPConfig(max_tokens_per_micro_batch=48, **options),
    )


def trained_weights(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    trainer = trainer_of(folder, **options)
    trainer.train()
    assert_distributed(CASE, trainer)
    return weights_of(trainer.model)


def refusal(folder: Path) -> str:
    """What is said of a loss that cannot be split."""
    try:
        trainer_of(folder, trainer_class=ClassWeighted, on_inexact="error").train()
    except InexactError as error:
        return str(error)
    return ""


def report_of(folder: Path) -> EquivalenceReport:
    """The report on the rows of this rank, of a model that was trained and is sharded."""
    trainer = trainer_of(folder, check_at_start=False)
    trainer.train()
    return compare(trainer, trainer.mbp_rows.sample(24), 6, together=trainer.mbp_feed.ranks)


def said_beside_a_long_row(folder: Path) -> tuple[int, str]:
    """How many rows this rank may compare where one is as long as all others together, and what is said."""
    trainer = trainer_of(folder)
    long_and_short = token_rows(1, low=60, high=60) + token_rows(7, low=3, high=4)
    trainer.train_dataset = with_labels(long_and_short, lambda index, row: index % 3)
    said, run = [], trainer.mbp_feed.check.run
    trainer.mbp_feed.check.run = lambda rows, *others: (  # type: ignore[method-assign]
        said.append((len(rows), run(rows, *others))) or said[-1][1]
    )
    trainer.train()
    return said[0]


def main(folder: Path) -> None:
    report = report_of(folder / "a")
    outcome = {
        "report": {"error": report.max_relative_error, "losses": (report.whole_loss, report.split_loss)},
        "refusal": refusal(folder / "b"),
        "long row": said_beside_a_long_row(folder / "e"),
        "checked": trained_weights(folder / "c", on_inexact="error"),
        "unchecked": trained_weights(folder / "d", check_at_start=False),
    }
    torch.save(outcome, folder / f"rank{os.environ['RANK']}.pt")
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
