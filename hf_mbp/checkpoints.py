"""Which checkpoints are whole: a process may have been killed, or the disk full, while one was saved.

`Trainer` writes a checkpoint file by file into the folder that it keeps, and takes the folder of the highest step for
the last checkpoint, half written or not. What it writes last is `trainer_state.json`, after everything that ranks
write together. So a checkpoint is whole if that file is, with one exception: each of several ranks writes the state of
its random numbers when it gets there, maybe after the first one is done. How many do is kept in the state.

Saving under another name and renaming in the end would be the other way. It would have to take over `_save_checkpoint`,
which looks for the best model, rotates and uploads before it returns, and which trainers of TRL override; and a rename
has to wait for all ranks, where under DDP a callback may have only one of them save. What is on disk can be judged
whenever it is read, whoever wrote it.
"""

import json
import math
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hf_mbp.byte_sizes import format_bytes
from hf_mbp.distributed import Ranks
from hf_mbp.kept import RANDOM_STATES, drop_entry, keep_entry
from hf_mbp.watch import explain

STATE = "trainer_state.json"

NONE = -1
"""The step of the last whole checkpoint where there is none."""


def last_checkpoint(output_dir: str | Path) -> str | None:
    """The last checkpoint of a run that is whole, to go on from; `None` if there is none.

    For `resume_from_checkpoint`, in the place of `transformers.trainer_utils.get_last_checkpoint`, which also returns
    one that was half written when the process was killed. Warns of those that it passes over.

    Example:
        >>> last_checkpoint("a/folder/without/runs") is None
        True
    """
    folder = Path(output_dir)
    step = _last_whole_step(folder)
    if note := _passed_over(folder, step):
        warnings.warn(note, stacklevel=2)
    return None if step == NONE else str(_folders(folder)[step])


def fault_of(checkpoint: Path) -> str:
    """Why a checkpoint is not whole; empty if it is."""
    return fault_of_state(checkpoint) or _fault_of_random_states(checkpoint)


def fault_of_state(checkpoint: Path) -> str:
    """Why nothing can go on from a checkpoint; empty if its state is whole, and so what was written before."""
    try:
        _state_of(checkpoint)
    except FileNotFoundError:
        return f"it has no {STATE}, which is written last"
    except ValueError:  # an object in JSON that was cut anywhere is none
        return f"its {STATE} is cut off"
    return ""


def begin(checkpoint: Path, trainer: Any, ranks: Ranks) -> None:
    """To be called by the rank that will write the state, before it writes anything else.

    The folder may hold an earlier checkpoint of the same step, whose state would vouch for files of both.
    """
    (checkpoint / STATE).unlink(missing_ok=True)
    # With `save_on_each_node` the folder of a machine has those of its own ranks only, with `save_only_model` none.
    if ranks.count > 1 and not (trainer.args.save_on_each_node or trainer.args.save_only_model):
        keep_entry(trainer, RANDOM_STATES, {"count": ranks.count})
    else:
        drop_entry(trainer, RANDOM_STATES)


@contextmanager
def explained(checkpoint: Path) -> Iterator[None]:
    """Has an error of saving say what became of the checkpoint; torch's own text does not even name a full disk."""
    try:
        yield
    except Exception as error:
        free = format_bytes(shutil.disk_usage(checkpoint if checkpoint.is_dir() else ".").free)
        explain(
            error,
            f"hf_mbp: {checkpoint} was not saved to its end, and does not count as a checkpoint. Its disk has {free} "
            "left. resume_from_checkpoint=True goes on from the last whole one.",
        )
        raise


def resumed_from(wanted: Any, output_dir: str | Path, ranks: Ranks) -> Any:
    """What to pass on as `resume_from_checkpoint`; to be called by all ranks.

    `True` becomes the last checkpoint that all ranks find whole, which on machines with disks of their own may not be
    the last one of each. What is no folder, and a folder without checkpoints, is left for the next class to refuse.

    Raises:
        ValueError: what is asked for was never written to its end.
    """
    if wanted is True:
        return _last_on_all(Path(output_dir), ranks) or wanted
    if isinstance(wanted, str | Path) and Path(wanted).is_dir() and (fault := fault_of_state(Path(wanted))):
        raise ValueError(
            f"resume_from_checkpoint={str(wanted)!r} is not whole: {fault}. Saving it was interrupted. Write "
            "resume_from_checkpoint=True for the last whole checkpoint in output_dir, or name another one."
        )
    return wanted


def _last_on_all(output_dir: Path, ranks: Ranks) -> str | None:
    """The last checkpoint that is whole on all ranks; `None` where there are no checkpoints, whole or not."""
    step = _last_step_on_all(output_dir, ranks)
    note = _passed_over(output_dir, step)
    if step != NONE:
        if note and ranks.index == 0:
            warnings.warn(note, stacklevel=4)
        return str(_folders(output_dir)[step])
    if ranks.highest(bool(note)):
        raise ValueError(
            f"resume_from_checkpoint=True, but no checkpoint in output_dir is whole. {note} Leave "
            "resume_from_checkpoint out to begin anew."
        )
    return None


def _last_step_on_all(output_dir: Path, ranks: Ranks) -> int:
    """The last step of which every rank has a whole checkpoint."""
    step = _last_whole_step(output_dir)
    while (lowest := int(ranks.lowest(step))) != ranks.highest(step):
        step = _last_whole_step(output_dir, at_most=lowest)
    return lowest


def _last_whole_step(output_dir: Path, at_most: float = math.inf) -> int:
    return next((at for at, folder in _folders(output_dir).items() if at <= at_most and not fault_of(folder)), NONE)


def _passed_over(output_dir: Path, step: int) -> str:
    """Which checkpoints are later than that of a step and why they are no good, in a line; empty if there is none."""
    faults = [
        f"{folder.name} is passed over: {fault_of(folder) or 'it is not whole on another machine'}."
        for at, folder in _folders(output_dir).items()
        if at > step
    ]
    return f"In {output_dir} {' '.join(faults)} Saving was interrupted." if faults else ""


def _folders(output_dir: Path) -> dict[int, Path]:
    """The folders of checkpoints by their steps, from the last one on."""
    found = {
        int(match[1]): folder
        for folder in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and folder.is_dir()
    }
    return dict(sorted(found.items(), reverse=True))


def _state_of(checkpoint: Path) -> dict[str, Any]:
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError(f"{checkpoint / STATE} is not the state of a trainer")
    return state


def _fault_of_random_states(checkpoint: Path) -> str:
    """What torch saves is a ZIP archive, whose directory is written last."""
    try:
        count = int(_state_of(checkpoint)["stateful_callbacks"][RANDOM_STATES]["count"])
    except (KeyError, TypeError, ValueError):  # of one process, or of stock
        return ""
    files = (checkpoint / f"rng_state_{rank}.pth" for rank in range(count))
    torn = next((file.name for file in files if not zipfile.is_zipfile(file)), None)
    return f"its {torn} is missing or cut off" if torn else ""
