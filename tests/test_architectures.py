"""The table of docs/exactness.md has every row, and those tried here are what the script gives."""

import sys
from pathlib import Path

import pytest

import check_architectures as script
from marked_table import table_in

ROOT = Path(__file__).parents[1]


CASES = {case.name: case for case in script.CASES}


def documented() -> list[str]:
    table = table_in(script.PAGE, "architectures")
    return [line for line in table.splitlines() if line.startswith("| ")][2:]


def test_the_page_has_all_rows() -> None:
    names = [", ".join(line.split(" | ")[:2]).removeprefix("| ") for line in documented()]
    assert names == list(CASES)
    assert len(names) >= 40


@pytest.mark.parametrize(
    "name",
    [
        "BERT, masked LM",
        "BERT, pretraining",
        "BERT, sequence classification, padded left",
        "GPT-2, causal LM, padded left",
        "Mixtral, causal LM, output_router_logits",
        "ResNet, image classification",
        "Whisper, speech to text",
        "CLIP, contrastive",
    ],
)
@pytest.mark.filterwarnings("ignore")  # of models of one library version or another, which the script does not mind
def test_rows_are_what_the_script_gives(name: str) -> None:
    outcome = script.examine(CASES[name])
    assert outcome.agrees
    assert outcome.row() in documented()


def test_a_check_that_disagrees_with_the_step_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exact = script.examine(CASES["BERT, token classification"])
    assert exact.agrees
    monkeypatch.setattr(script, "examine", lambda case: script.Outcome(**{**vars(exact), "error": 0.5}))
    monkeypatch.setattr(sys, "argv", ["check_architectures.py", "--only", "BERT, token classification"])
    assert script.main() == 1
    assert "BERT, token classification: step 0.5, check says " in capsys.readouterr().err


def test_the_step_is_compared_with_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not vacuous: a wrong count in the trainer shows in the error of the step."""
    monkeypatch.setattr(script.MBPTrainer, "num_items", lambda self, micro_batch: 1.0)
    assert not script.examine(CASES["BERT, token classification"]).is_exact
