"""Which checkpoints are whole, and which one a run goes on from."""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification
from transformers.trainer_utils import get_last_checkpoint

from hf_mbp import checkpoints, last_checkpoint
from hf_mbp.checkpoints import STATE, fault_of, resumed_from
from tests.helpers import bert_config, build, mbp_trainer, token_rows, with_labels


def trainer(folder: Path, **changes: Any) -> Any:
    rows = with_labels(token_rows(48), lambda index, row: index % 3)
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "optim": "adamw_torch", **changes}
    return mbp_trainer(build(BertForSequenceClassification, bert_config(num_labels=3)), rows, folder, **options)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run with three whole checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    trainer(folder).train()
    return folder


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """Another one, to be damaged."""
    return Path(shutil.copytree(run, tmp_path / "run"))


def in_the_order_of_writing(checkpoint: Path) -> list[Path]:
    return sorted(checkpoint.iterdir(), key=lambda file: file.stat().st_mtime_ns)


def test_what_stock_writes_last_is_the_state(run: Path) -> None:
    """It is what all of this rests on."""
    names = [file.name for file in in_the_order_of_writing(run / "checkpoint-6")]
    assert names[-1] == STATE
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} < set(names)


def test_no_part_of_a_checkpoint_is_a_whole_one(run: Path, tmp_path: Path) -> None:
    """A process is killed after any of its files, or in the middle of any of them."""
    files, written = in_the_order_of_writing(run / "checkpoint-6"), tmp_path / "checkpoint-6"
    written.mkdir()
    for file in files:
        data = file.read_bytes()
        for size in sorted({0, 1, len(data) // 2, len(data) - 2}):  # without its last brace, a state is none
            (written / file.name).write_bytes(data[:size])
            assert fault_of(written)
            assert last_checkpoint_quietly(tmp_path) is None
        (written / file.name).write_bytes(data)
    assert fault_of(written) == ""
    assert last_checkpoint(tmp_path) == str(written) == get_last_checkpoint(str(tmp_path))


@pytest.mark.parametrize(
    ("state", "fault"),
    [
        ("[]", "is cut off"),
        ('{"stateful_callbacks": null}', ""),
        ('{"stateful_callbacks": {"hf_mbp_random_states": 3}}', ""),
        ('{"stateful_callbacks": {"hf_mbp_random_states": {"count": "many"}}}', ""),
    ],
)
def test_a_state_of_others_says_nothing_of_random_states(state: str, fault: str, tmp_path: Path) -> None:
    (tmp_path / STATE).write_text(state)
    assert fault_of(tmp_path) == (f"its {STATE} {fault}" if fault else "")


def last_checkpoint_quietly(folder: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return last_checkpoint(folder)


def without_state(checkpoint: Path) -> None:
    (checkpoint / STATE).unlink()


def with_half_a_state(checkpoint: Path) -> None:
    (checkpoint / STATE).write_text((checkpoint / STATE).read_text()[:-300])


REASONS = {without_state: "it has no trainer_state.json, which is written last", with_half_a_state: "is cut off"}


@pytest.mark.parametrize("damage", REASONS)
def test_a_run_goes_on_from_the_last_whole_one(damage: Callable[[Path], None], run: Path, copy: Path) -> None:
    damage(copy / "checkpoint-6")
    (copy / "checkpoint-9.tmp").mkdir()
    (copy / "checkpoint-8").touch()
    whole = trainer(run)
    whole.train(resume_from_checkpoint=True)
    resumed = trainer(copy)
    line = rf"checkpoint-6 is passed over: .*{REASONS[damage]}\. Saving was interrupted\.$"
    with pytest.warns(UserWarning, match=line) as warned:
        resumed.train(resume_from_checkpoint=True)
    assert len(warned) == 1
    assert get_last_checkpoint(str(copy)) == str(copy / "checkpoint-6"), "saved again, as a whole one"
    assert fault_of(copy / "checkpoint-6") == ""
    assert resumed.state.global_step == 6
    torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


def test_where_none_is_whole_nothing_goes_on(copy: Path) -> None:
    for step in (2, 4, 6):
        without_state(copy / f"checkpoint-{step}")
    with pytest.raises(ValueError, match=r"no checkpoint in output_dir is whole\. In .* checkpoint-6 is passed over"):
        trainer(copy).train(resume_from_checkpoint=True)
    with pytest.warns(UserWarning, match=r"checkpoint-6 .* checkpoint-4 .* checkpoint-2 "):
        assert last_checkpoint(copy) is None


def test_what_was_never_whole_is_refused_by_name(copy: Path) -> None:
    without_state(copy / "checkpoint-6")
    for path in (str(copy / "checkpoint-6"), copy / "checkpoint-6"):
        with pytest.raises(ValueError, match=r"checkpoint-6' is not whole: .*resume_from_checkpoint=True for the last"):
            trainer(copy).train(resume_from_checkpoint=path)


def test_what_is_no_folder_is_left_for_stock_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Can't find a valid checkpoint at"):
        trainer(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    with pytest.raises(ValueError, match="No valid checkpoint found in output directory"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


class Killed(BaseException):
    """In the place of the end of the process."""


def test_an_earlier_checkpoint_of_the_step_does_not_vouch_for_files_of_another(copy: Path) -> None:
    """A run from the start in the same folder has replaced the weights of step 2, but not yet the optimizer."""
    again = trainer(copy, learning_rate=0.02)

    def kill(*_: Any) -> None:
        raise Killed

    again._save_optimizer_and_scheduler = kill
    with pytest.raises(Killed):
        again.train()
    assert "no trainer_state.json" in fault_of(copy / "checkpoint-2")
    assert last_checkpoint(copy) == str(copy / "checkpoint-6")


def test_an_error_of_saving_says_what_is_left(tmp_path: Path) -> None:
    failing = trainer(tmp_path)

    def fail(*_: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0")

    failing._save_optimizer_and_scheduler = fail
    with pytest.raises(RuntimeError, match="unexpected pos 64 vs 0") as raised:
        failing.train()
    if hasattr(raised.value, "add_note"):
        (note,) = raised.value.__notes__
        assert note.startswith(f"hf_mbp: {tmp_path / 'checkpoint-2'} was not saved to its end")
        assert "B left" in note
    assert last_checkpoint_quietly(tmp_path) is None


class Ranks:
    """This process is one of two; `other` says what the other one finds, question by question."""

    def __init__(self, *other: float, index: int = 0) -> None:
        self.count, self.index, self.other = 2, index, list(other)

    def lowest(self, number: float) -> float:
        return min(number, self.other[0])

    def highest(self, number: float) -> int:
        return int(max(number, self.other.pop(0)))


def test_ranks_go_on_from_what_all_have(run: Path) -> None:
    """On disks of their own: the other rank has none at step 6, and then none at step 4 either."""
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over: it is not whole on another machine"):
        assert resumed_from(True, run, Ranks(4, 4)) == str(run / "checkpoint-4")
    with pytest.warns(UserWarning, match=r"checkpoint-6 .* checkpoint-4 "):
        assert resumed_from(True, run, Ranks(5, 2, 2)) == str(run / "checkpoint-2")
    assert resumed_from(True, run, Ranks(4, 4, index=1)) == str(run / "checkpoint-4"), "one line, from rank 0"
    with pytest.raises(ValueError, match="no checkpoint in output_dir is whole"):
        resumed_from(True, run, Ranks(-1, -1, 0))
    assert resumed_from(None, run, Ranks()) is None


@pytest.mark.parametrize("rank", [0, 1])
def test_random_states_of_all_ranks_belong_to_a_checkpoint(rank: int, copy: Path) -> None:
    """Each writes its own, and the first one may write the state before another is done."""
    saver = trainer(copy)
    saver.state.stateful_callbacks = {}
    checkpoint = copy / "checkpoint-6"
    random_states = (checkpoint / "rng_state.pth").read_bytes()
    checkpoints.begin(checkpoint, saver, Ranks())
    saver.state.save_to_json(str(checkpoint / STATE))
    for index in (0, 1):
        (checkpoint / f"rng_state_{index}.pth").write_bytes(random_states)
    assert fault_of(checkpoint) == ""
    torn = checkpoint / f"rng_state_{rank}.pth"
    torn.write_bytes(random_states[:-100])
    assert fault_of(checkpoint) == f"its {torn.name} is missing or cut off"
    torn.unlink()
    assert fault_of(checkpoint) == f"its {torn.name} is missing or cut off"
    with pytest.warns(UserWarning, match="checkpoint-6 is passed over"):
        assert last_checkpoint(copy) == str(copy / "checkpoint-4")


@pytest.mark.parametrize("option", ["save_on_each_node", "save_only_model"])
def test_random_states_that_are_not_written_there_are_not_missed(option: str, tmp_path: Path) -> None:
    saver = trainer(tmp_path)
    checkpoints.begin(tmp_path, saver, Ranks())
    assert saver.state.stateful_callbacks["hf_mbp_random_states"] == {"count": 2}
    setattr(saver.args, option, True)
    checkpoints.begin(tmp_path, saver, Ranks())
    assert "hf_mbp_random_states" not in saver.state.stateful_callbacks
