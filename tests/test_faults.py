"""Where something fails in a run, it says what, and goes on afterwards as if nothing had been."""

import json
import sys
from pathlib import Path

import pytest
import torch

import faults
from reliability.failing import FAULTS, STEP
from reliability.run import STEPS, same_bits, train


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run in which nothing fails."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder)
    return folder


ERRORS = {
    "killed worker": (RuntimeError, r"DataLoader worker \(pid \d+\) is killed by signal: Killed", 2),
    "raising row": (KeyError, "Caught KeyError in DataLoader worker process 0", 2),
    "batch of nothing": (TypeError, "The data collator returned a NoneType, and must return a dictionary", 2),
    "batch of another type": (TypeError, "The data collator returned a list, and must return a dictionary", 2),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_ends_a_run_that_can_go_on(name: str, whole: Path, tmp_path: Path) -> None:
    kind, text, step = ERRORS[name]
    with pytest.raises(kind, match=text):
        train(tmp_path, FAULTS[name].prepare)
    assert [folder.name for folder in tmp_path.iterdir()] == [f"checkpoint-{step}"]
    train(tmp_path)
    assert same_bits(tmp_path, whole)


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
def test_a_full_disk_leaves_the_checkpoint_before(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="unexpected pos"):
        train(tmp_path, FAULTS["full disk"].prepare)
    assert json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["global_step"] == 4
    (tmp_path / "checkpoint-6" / "optimizer.pt").unlink()
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        train(tmp_path)
    assert same_bits(tmp_path, whole)


@pytest.mark.parametrize("name", ["empty row", "batch of fewer rows"])
def test_fewer_tokens_are_no_fault(name: str, whole: Path, tmp_path: Path) -> None:
    train(tmp_path, FAULTS[name].prepare)
    ours, expected = (torch.load(folder / "outcome0.pt") for folder in (tmp_path, whole))
    assert ours["losses"][:STEP] == expected["losses"][:STEP]
    assert ours["losses"][STEP] != expected["losses"][STEP]
    assert ours["step"] == STEPS
    assert all(bool(weight.isfinite().all()) for weight in ours["weights"].values())


def test_a_loss_that_the_log_hides_is_warned_of_once(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"^Step {STEP + 1}: the loss is nan, which logging_nan_inf_filter") as warned:
        train(tmp_path, FAULTS["loss that is no number"].prepare, max_steps=STEP + 3)
    assert len(warned) == 1
    train(
        tmp_path / "shown", FAULTS["loss that is no number"].prepare, max_steps=STEP + 1, logging_nan_inf_filter=False
    )
    losses = torch.load(tmp_path / "shown" / "outcome0.pt")["losses"]
    assert [loss != loss for loss in losses] == [False] * STEP + [True]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_FSIZE is enforced on Linux")
def test_the_script_compares_with_the_plain_trainer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["faults.py", "--kills", "0", "--faults", "quota"])
    assert faults.main() == 0
    (row,) = [line for line in capsys.readouterr().out.split("\n\n")[-1].splitlines() if "too large |" in line]
    assert "File too large (os error 27)` | the same | checkpoint-4 | yes |" in row
