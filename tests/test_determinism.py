"""Two runs give the same bits, whatever the workers; a resumed run equals one that was never interrupted."""

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForMaskedLM, BertForSequenceClassification, DataCollatorForLanguageModeling

from tests.helpers import DROPOUT, bert_config, build, mbp_trainer, token_rows, tokenizer, with_labels

RUN = {
    "per_device_train_batch_size": 3,
    "gradient_accumulation_steps": 4,
    "max_steps": -1,
    "num_train_epochs": 2,
    "optim": "adamw_torch",
    "lr_scheduler_type": "linear",
}


def masked_lm() -> Any:
    return build(BertForMaskedLM, bert_config(**DROPOUT)).float()


def trained(folder: Path, *, resume_from: str | None = None, **changes: Any) -> Any:
    """Masked language modelling with dropout: 48 rows, 4 steps an epoch."""
    trainer = mbp_trainer(
        masked_lm(),
        token_rows(48),
        folder,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3),
        **{**RUN, **changes},
    )
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def assert_same_bits(one: Any, other: Any) -> None:
    assert one.state.global_step == other.state.global_step
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)


def test_two_runs_and_any_number_of_workers(tmp_path: Path) -> None:
    first = trained(tmp_path)
    for workers in (0, 2):
        assert_same_bits(first, trained(tmp_path, dataloader_num_workers=workers))


def test_another_seed_draws_other_masks(tmp_path: Path) -> None:
    losses = [trained(tmp_path, seed=seed, max_steps=1).state.log_history[0]["loss"] for seed in (1, 2)]
    assert losses[0] != losses[1]


def test_what_else_draws_random_numbers_does_not_change_the_masks(tmp_path: Path) -> None:
    def masks(draws: int) -> list[torch.Tensor]:
        drawn: list[torch.Tensor] = []
        collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)

        class Restless:
            def __getitem__(self, index: int) -> Any:
                torch.rand(draws)
                random.random()
                return token_rows(48)[index]

            def __len__(self) -> int:
                return 48

        def collate(rows: Any) -> Any:
            batch = collator(rows)
            drawn.append(batch["labels"].clone())
            return batch

        mbp_trainer(masked_lm(), Restless(), tmp_path, data_collator=collate, check_at_start=False, max_steps=2).train()
        return drawn

    one, other = masks(1), masks(1000)
    assert len(one) == len(other) > 2
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_resumed_run_equals_the_uninterrupted_one(step: int, tmp_path: Path) -> None:
    """Interrupted in the middle of an epoch (3, 6) and between epochs (4)."""
    whole = trained(tmp_path, save_strategy="steps", save_steps=step)
    resumed = trained(tmp_path / "resumed", resume_from=str(tmp_path / f"checkpoint-{step}"))
    assert whole.state.global_step == 8
    assert_same_bits(whole, resumed)
    assert [log["loss"] for log in resumed.state.log_history if "loss" in log] == [
        log["loss"] for log in whole.state.log_history if "loss" in log
    ]


def test_a_resumed_run_keeps_the_budget_that_was_measured(tmp_path: Path) -> None:
    """What is free differs from run to run; were it measured again, the plan and so the dropout would change."""

    def run(folder: Path, resume_from: str | None = None) -> Any:
        rows = with_labels(token_rows(48), lambda index, row: index % 3)
        trainer = mbp_trainer(
            build(BertForSequenceClassification, bert_config(num_labels=3, **DROPOUT)),
            rows,
            folder,
            max_tokens_per_micro_batch=None,
            **{**RUN, "save_strategy": "steps", "save_steps": 3},
        )
        trainer.train(resume_from_checkpoint=resume_from)
        return trainer

    whole = run(tmp_path)
    kept = copy.deepcopy(whole.state.stateful_callbacks["hf_mbp"])
    resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-3"))
    assert resumed.state.stateful_callbacks["hf_mbp"] == kept
    assert kept["budget"]["max_bytes"] > 0
    assert_same_bits(whole, resumed)
