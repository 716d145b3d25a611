"""Checkpoints of every version load in all later ones; entries that another version has kept otherwise are told of."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from transformers import BertForSequenceClassification

from hf_mbp.kept import BUDGET, COST
from hf_mbp.profile import key_of
from tests import released
from tests.helpers import Pad

CHECKPOINTS = sorted(
    released.DATA.glob("checkpoint-*"), key=lambda path: Version(path.name.removeprefix("checkpoint-"))
)

LATER = 99
"""The version of an entry that this library does not know."""


def entries(checkpoint: Path) -> dict[str, Any]:
    """What the library has kept."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return {name: state["stateful_callbacks"][name] for name in (BUDGET, COST)}


def changed(checkpoint: Path, folder: Path, changes: dict[str, dict[str, Any]]) -> Path:
    """A copy whose entries are changed."""
    copy = shutil.copytree(checkpoint, folder / "changed")
    state = json.loads((copy / "trainer_state.json").read_text())
    for name, values in changes.items():
        state["stateful_callbacks"][name] |= values
    (copy / "trainer_state.json").write_text(json.dumps(state))
    return copy


def budgets(trainer: Any) -> list[int]:
    """Of the steps after the checkpoint, as they were logged."""
    logs = [log for log in trainer.state.log_history if log["step"] > released.SAVED_AFTER and "mbp_max_tokens" in log]
    return [log["mbp_max_tokens"] for log in logs]


def plain_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The steps after the checkpoint in plain PyTorch."""
    model, rows, pad = BertForSequenceClassification.from_pretrained(checkpoint).train(), released.rows(), Pad()
    optimizer = torch.optim.SGD(model.parameters(), lr=released.LEARNING_RATE)
    for step in range(released.SAVED_AFTER, released.STEPS):
        model(**pad(rows[step * released.ROWS_A_STEP : (step + 1) * released.ROWS_A_STEP])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: weight.detach() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_a_run_of_an_earlier_version_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    kept = entries(checkpoint)[BUDGET]
    trainer = released.trainer(tmp_path, calibrate=False)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    weights = {name: weight.detach() for name, weight in trainer.model.named_parameters()}
    torch.testing.assert_close(weights, plain_weights(checkpoint), rtol=1e-5, atol=1e-6)
    assert set(budgets(trainer)) == {kept["budget"]["max_tokens"]} != {kept["options"]["max_tokens"]}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS, ids=lambda path: path.name)
def test_a_measured_cost_of_an_earlier_version_holds_where_it_was_measured(checkpoint: Path, tmp_path: Path) -> None:
    """It is not measured anew, of which a warning would tell; and two steps are too few for that."""
    trainer = released.trainer(tmp_path)
    here = changed(checkpoint, tmp_path, {COST: {"key": key_of(trainer)}})
    trainer.train(resume_from_checkpoint=str(here))
    assert trainer.state.stateful_callbacks[COST] == entries(here)[COST]


@pytest.mark.parametrize("options", [{}, {"options": {"tokens": 64}}], ids=["the same options", "other options"])
def test_a_budget_of_another_version_is_refused_with_a_message(options: dict[str, Any], tmp_path: Path) -> None:
    """Whatever it has kept, of which nothing is known."""
    later = changed(CHECKPOINTS[-1], tmp_path, {BUDGET: {"version": LATER, **options}})
    trainer = released.trainer(tmp_path, calibrate=False)
    with pytest.warns(
        UserWarning, match=f"The budget of the checkpoint does not hold here: .*version {LATER} is not .* found anew"
    ):
        trainer.train(resume_from_checkpoint=str(later))
    assert set(budgets(trainer)) == {64}


def test_a_cost_of_another_version_is_refused_with_a_message(tmp_path: Path) -> None:
    later = changed(CHECKPOINTS[-1], tmp_path, {COST: {"version": LATER}})
    trainer = released.trainer(tmp_path)
    with pytest.warns(
        UserWarning, match=f"cost of the checkpoint does not hold here: .*version {LATER} is not .* measured anew"
    ):
        trainer.train(resume_from_checkpoint=str(later))


def test_what_is_kept_has_changed_only_if_its_version_has(tmp_path: Path) -> None:
    """Of what the newest version that is kept has left; see CONTRIBUTING.md, "A release"."""
    for name, now in entries(released.write(tmp_path)).items():
        kept = entries(CHECKPOINTS[-1])[name]
        assert now["version"] > kept["version"] or names(now) == names(kept), name


def names(value: Any, where: str = "") -> set[str]:
    """The names in an entry, each with those it is in; of a list, those of its first element."""
    if isinstance(value, dict):
        inside = set().union(*(names(inner, f"{where}/{name}") for name, inner in value.items()))
        return inside | {f"{where}/{name}" for name in value}
    return names(value[0], where) if isinstance(value, list) and value else set()
