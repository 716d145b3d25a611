"""A run that is killed in any of its phases ends, bit for bit, as one that was never interrupted."""

import warnings
from pathlib import Path

import torch

from hf_mbp import last_checkpoint
from reliability.killing import PHASES, Moment, Runs
from reliability.run import STEPS, same_bits


def killed(runs: Runs, folder: Path, moments: list[Moment]) -> None:
    """Kills a run that goes on from its last whole checkpoint each time, and finishes it."""
    for moment in moments:
        assert set(runs.kill(folder, moment)) <= set(PHASES)
        assert not list(folder.glob("outcome*"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whether the last one is whole depends on the moment
        assert last_checkpoint(folder) is not None
    runs.finish(folder)


def test_one_process(tmp_path: Path) -> None:
    runs = Runs()
    runs.finish(tmp_path / "whole")
    moments = [
        Moment(phase="forward", step=3, seconds=0.001),
        Moment(phase="backward", step=5, seconds=0.002),
        Moment(phase="optimizer", step=7, seconds=0),
        Moment(phase="saving", step=9, seconds=0.004),
    ]
    killed(runs, tmp_path / "killed", moments)
    assert same_bits(tmp_path / "killed", tmp_path / "whole")
    outcome = torch.load(tmp_path / "whole" / "outcome0.pt")
    assert outcome["step"] == len(set(outcome["losses"])) == STEPS


def test_two_processes(tmp_path: Path) -> None:
    """Both are killed while one of them saves, first the one, then the other one."""
    runs = Runs(num_ranks=2)
    runs.finish(tmp_path / "whole")
    moments = [Moment(phase="saving", step=step, seconds=0.003, rank=rank) for step, rank in ((3, 1), (7, 0))]
    killed(runs, tmp_path / "killed", moments)
    assert same_bits(tmp_path / "killed", tmp_path / "whole")


def test_a_bit_is_a_difference(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
    weight = torch.ones(3)
    torch.save({"weights": {"a": weight}, "step": 1}, tmp_path / "one" / "outcome0.pt")
    assert not same_bits(tmp_path / "other", tmp_path / "one")
    torch.save({"weights": {"a": weight.nextafter(torch.zeros(3))}, "step": 1}, tmp_path / "other" / "outcome0.pt")
    assert same_bits(tmp_path / "one", tmp_path / "one")
    assert not same_bits(tmp_path / "other", tmp_path / "one")
