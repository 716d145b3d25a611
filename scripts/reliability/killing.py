"""Kills a run with SIGKILL, at a moment within one of its phases.

The run says when it enters the phase, and who kills it waits a little longer, so that any instruction may be the last.
The processes are forked from one that has imported everything: a start takes a tenth of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
import transformers
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from hf_mbp import MBPTrainer, last_checkpoint
from reliability.run import STEPS, train

PHASES = ("reading", "forward", "backward", "optimizer", "saving")
"""What a run does, in turns; `reading` is everything else."""

NOWHERE = len(PHASES)
"""The phase of a process that has not begun to train."""

SECONDS = 300
"""After which a run that has not ended hangs; it takes some seconds, and several times that on a busy machine."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """When a run is killed.

    Args:
        phase: one of `PHASES`.
        step: the first one, counted from 0, in which the phase is waited for.
        seconds: from when the phase begins.
        rank: whose phase it is, and who is killed first.
    """

    phase: str
    step: int
    seconds: float
    rank: int = 0


class Phases(TrainerCallback):
    """Notes which phase a run is in where other processes see it, and tells once when the one waited for begins."""

    def __init__(self, current: Any, moment: Moment | None, told: Any) -> None:
        self.current, self.moment, self.told = current, moment, told
        self.trainer: Any = None

    def enter(self, phase: str) -> None:
        """From here on."""
        self.current.value = PHASES.index(phase)
        awaited = self.moment
        if awaited and phase == awaited.phase and self.trainer.state.global_step >= awaited.step:
            self.moment = None
            self.told.send(phase)

    def watch(self, trainer: Any) -> None:
        """Follows the trainer through its phases."""
        self.trainer = trainer
        trainer.phases = self
        trainer.add_callback(self)
        trainer.model.register_forward_pre_hook(lambda module, _: self._enter_pass(module, "forward"))
        trainer.model.register_forward_hook(lambda module, *_: self._enter_pass(module, "backward"))

    def _enter_pass(self, module: Any, phase: str) -> None:
        if module.training and torch.is_grad_enabled():
            self.enter(phase)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """Gradients are complete."""
        self.enter("optimizer")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        """The optimizer has stepped."""
        self.enter("reading")


class WatchedTrainer(MBPTrainer):
    """Says when it saves."""

    phases: Phases

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        self.phases.enter("saving")
        super()._save_checkpoint(*args, **kwargs)
        self.phases.enter("reading")


class Runs:
    """Starts runs of so many processes."""

    def __init__(self, num_ranks: int = 1) -> None:
        self.num_ranks = num_ranks
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([__name__])
        # Before Python 3.13 that process looks for modules only where the environment says, and goes without.
        places = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, places))

    def finish(self, folder: Path) -> None:
        """Trains to the end, from the last whole checkpoint in the folder.

        Raises:
            RuntimeError: it did not get there.
        """
        processes, _, _ = self._start(folder, None)
        _join(processes)
        codes = [process.exitcode for process in processes]
        if any(codes):
            raise RuntimeError(f"the run ended with {codes}:\n{_printed(folder)}")

    def kill(self, folder: Path, moment: Moment) -> list[str]:
        """Trains as `finish` does, and kills all ranks at the moment; returns the phase that each was killed in.

        Raises:
            RuntimeError: the run ended before.
        """
        processes, phases, told = self._start(folder, moment)
        try:
            if not told.poll(SECONDS):
                raise EOFError
            told.recv()
        except EOFError:
            _join(processes, seconds=0)
            raise RuntimeError(f"the run never came to {moment}:\n{_printed(folder)}") from None
        time.sleep(moment.seconds)
        for process in (processes[moment.rank], *processes):
            process.kill()
        _join(processes)
        return [(*PHASES, "starting")[phase.value] for phase in phases]

    def _start(self, folder: Path, moment: Moment | None) -> tuple[list[Any], list[Any], Any]:
        folder.mkdir(exist_ok=True)
        port = _free_port()
        phases = [self._context.RawValue("i", NOWHERE) for _ in range(self.num_ranks)]
        here, there = self._context.Pipe(duplex=False)
        processes = []
        for rank, phase in enumerate(phases):
            own = moment if moment and moment.rank == rank else None
            arguments = (rank, self.num_ranks, port, folder, phase, own, there)
            processes.append(self._context.Process(target=_train_as_rank, args=arguments))
            processes[-1].start()
        there.close()  # so that the end of those who have it shows
        return processes, phases, here


def _train_as_rank(
    rank: int, num_ranks: int, port: int, folder: Path, phase: Any, moment: Moment | None, told: Any
) -> None:
    """In a process that was started by itself, without a launcher; what it prints goes to a file."""
    output = os.open(folder / f"output{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(output, 1)
    os.dup2(output, 2)
    multiprocessing.set_start_method("fork", force=True)  # for loaders' workers; as it is, they would import it all
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    if num_ranks > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_WORLD_SIZE": num_ranks}
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in {**ranks, **meeting}.items()})
    train(folder, Phases(phase, moment, told).watch, WatchedTrainer)
    if num_ranks > 1:
        torch.distributed.barrier()
        # Gloo's destructor may wait for ever: it joins its thread while it holds Python's lock (torch 2.13).
        os._exit(0)


def _join(processes: Sequence[Any], seconds: float = SECONDS) -> None:
    """Waits for all to end, and kills those that do not."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        process.kill()
        process.join()


def _printed(folder: Path) -> str:
    return "\n".join(file.read_text()[-2000:] for file in sorted(folder.glob("output*")))


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@dataclass(frozen=True, kw_only=True)
class Kill:
    """What a kill left behind.

    Args:
        num_ranks: of the run.
        phase: that the first rank was in.
        left: the names of the last folder of a checkpoint, and of the one that is whole; `None` where there is none.
    """

    num_ranks: int
    phase: str
    left: tuple[str | None, str | None]

    def __str__(self) -> str:
        last, whole = self.left
        return f"{self.phase} ({last}{f'; whole: {whole}' if self.is_half_written else ''})"

    @property
    def is_half_written(self) -> bool:
        """Whether the last folder is not that of a whole checkpoint."""
        return self.left[0] != self.left[1]


LATEST_SECONDS = 0.02
"""Longest time from the begin of a phase to a kill: about what a step, or writing a checkpoint, takes."""

WINDOW = 5
"""A run is killed within so many steps from where it began, so that it can be killed again."""


def kill_until_done(runs: Runs, folder: Path, random: Random, most: int) -> list[Kill]:
    """Kills a run again and again, up to so many times, and has it train to the end."""
    kills: list[Kill] = []
    while len(kills) < most and (begin := _step_of(_last(folder))) < STEPS - 1:
        moment = Moment(
            phase=random.choice(PHASES),
            step=random.randint(begin + 1, min(begin + WINDOW, STEPS - 1)),
            seconds=random.uniform(0, LATEST_SECONDS),
            rank=random.randrange(runs.num_ranks),
        )
        phase = runs.kill(folder, moment)[moment.rank]
        kills.append(
            Kill(num_ranks=runs.num_ranks, phase=phase, left=(_name(get_last_checkpoint(folder)), _last(folder)))
        )
    runs.finish(folder)
    return kills


def _last(folder: Path) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of those that are passed over, which are what is looked for
        return _name(last_checkpoint(folder))


def _name(checkpoint: str | None) -> str | None:
    return Path(checkpoint).name if checkpoint else None


def _step_of(name: str | None) -> int:
    return int(name.rpartition("-")[2]) if name else 0
