"""The trainers of TRL with `MBPMixin` log in an evaluation what they log unsplit."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_trl import LOGGED, approximately
from tests.trl_runs import CASES, dataset, trainer_of, uneven_sizes

pytestmark = [
    # TRL says so of options that it still supports, and touches an old name of transformers itself.
    pytest.mark.filterwarnings("ignore:`(compute_loss_func|label_smoothing_factor)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`return_outputs=True`, and the logits:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

UNSPLIT = ("sft-bfd", "sft-wrapped", "sft-padding-free")
"""Rows that are packed, or laid end to end: they are fewer, or cannot be taken out of a batch."""


class Rows:
    """Notes the rows of every forward pass of a model, whose base model TRL may call."""

    def __init__(self, model: Any) -> None:
        self.rows: list[int] = []
        model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", kwargs.get("inputs_embeds"))
        self.rows.append(len(ids if ids is not None else args[0]))


@pytest.mark.parametrize("name", [name for name in CASES if name != "sft-own-loss"])  # TRL evaluates without a count
def test_evaluations_are_those_of_the_unsplit_trainer(name: str, tmp_path: Path) -> None:
    case, found, seen = CASES[name], [], []
    for split in (False, True):
        rows = dataset(case.rows, uneven_sizes(32))
        trainer = trainer_of(case, rows, tmp_path, split=split, per_device_eval_batch_size=16)
        noted = Rows(trainer.model)
        prepared = trainer.train_dataset
        columns = [column for column in prepared.column_names if column.startswith("ref_")]  # evaluating adds them
        trainer.evaluate(prepared.remove_columns(columns))
        log = trainer.state.log_history[-1]
        assert {f"eval_{metric}" for metric in LOGGED[case.trainer]} <= log.keys()
        found.append({key: value for key, value in log.items() if "per_second" not in key and "time" not in key})
        seen.append(noted.rows)
    whole, ours = found
    assert ours.keys() == whole.keys()
    assert ours == {key: approximately(value) for key, value in whole.items()}
    if name not in UNSPLIT:
        assert len(seen[1]) > len(seen[0]) + 6
        assert max(seen[1]) < max(seen[0])


@pytest.mark.parametrize("name", ["reward", "dpo-sigmoid"])
def test_predictions_of_pairs_come_back_in_order(name: str, tmp_path: Path) -> None:
    """Chosen rows first, then the rejected ones, as in the batch."""
    case, found = CASES[name], []
    for split in (False, True):
        rows = dataset(case.rows, uneven_sizes(16))
        trainer = trainer_of(case, rows, tmp_path, split=split, per_device_eval_batch_size=16)
        batch = next(iter(trainer.get_eval_dataloader(trainer.train_dataset)))
        found.append((trainer.prediction_step(trainer.model.eval(), batch, False), batch))
    ((whole_loss, whole, _), batch), ((loss, ours, _), _) = found
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=0)
    whole, ours = (value[0] if isinstance(value, tuple) else value for value in (whole, ours))
    assert ours.shape == whole.shape
    for row, (one, other) in enumerate(zip(whole, ours, strict=True)):
        length = int(batch["attention_mask"][row].sum()) if one.ndim > 1 else None
        torch.testing.assert_close(other[:length], one[:length], rtol=1e-6, atol=1e-6)
