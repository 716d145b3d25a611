"""Checkpoints to go on from: what this library keeps in them, and their files, spoiled."""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import torch
from transformers import BertConfig, BertForTokenClassification, TrainingArguments

from fuzzing import tables
from fuzzing.mutations import spoiled_bytes, spoiled_value
from fuzzing.trial import Input, WorkBegins, inside
from hf_mbp import MBPConfig, MBPMixin, MBPTrainer
from hf_mbp.cli.main import main
from hf_mbp.kept import BUDGET, COST

STATE = "trainer_state.json"
STEPS = 11
"""After ten the cost is measured and kept."""

CONFIGS = {
    "tokens": {"max_tokens_per_micro_batch": 32},
    "memory": {"memory_limit": 0.5},
}
"""What a budget can come from."""


# The entries


def make_entries(random: Random) -> Input:
    """The state of a trainer whose entries of ours are spoiled."""
    name = random.choice(list(CONFIGS))
    files = _right_checkpoint(name)
    state = json.loads(files[STATE])
    entries = state["stateful_callbacks"]
    spoiled = random.choice((BUDGET, COST))
    entries[spoiled] = spoiled_value(random, entries[spoiled])
    return Input(argv=(name,), files={**files, STATE: json.dumps(state).encode()})


def resume_with_entries(tried: Input) -> int:
    """Goes on for a step; 2 if that is done without an entry, which is warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = _trainer(tried.argv[0], "new", STEPS + 1)
        trainer.train(resume_from_checkpoint=".")
    budget = trainer.mbp_feed.budget.settled
    asked = trainer.mbp_config.max_tokens_per_micro_batch
    if budget.max_tokens != asked if asked is None else not 1 <= budget.max_tokens <= asked:
        raise AssertionError(f"the budget is {budget}")
    said = [
        str(warning.message) for warning in caught if "of the checkpoint does not hold here" in str(warning.message)
    ]
    for message in said[:1]:
        print(f"error: {STATE}: {message}", file=sys.stderr)
    return 2 if said else 0


def _trainer(name: str, folder: str, steps: int) -> MBPTrainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    return MBPTrainer(
        model=BertForTokenClassification(BertConfig(vocab_size=32, max_position_embeddings=16, **sizes)),
        args=TrainingArguments(
            **{"output_dir": folder, "max_steps": steps, "per_device_train_batch_size": 4, "logging_strategy": "no"},
            **{"save_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True},
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"input_ids": [5] * length, "labels": [1] * length} for length in range(1, 13)],
        data_collator=_pad,
        mbp_config=MBPConfig(calibrate=True, check_at_start=False, **CONFIGS[name]),
    )


def _pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    columns = {"input_ids": 0, "labels": -100}
    return {
        name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True, fill)
        for name, fill in columns.items()
    }


@cache
def _right_checkpoint(name: str) -> Mapping[str, bytes]:
    """Files of a checkpoint with both entries."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        trainer = _trainer(name, folder, STEPS)
        trainer.train()
        trainer._save_checkpoint(trainer.model, None)
        files = _files_in(Path(folder, f"checkpoint-{STEPS}"))
    assert set(json.loads(files[STATE])["stateful_callbacks"]) >= {BUDGET, COST}
    return files


def _files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The files


TASK = "text_classification"
FOLDER = "run/checkpoint-1/"


def make_checkpoint(random: Random) -> Input:
    """A recipe to go on with, and a checkpoint with a file that is not as it was."""
    files = dict(_right_run())
    name = random.choice([name for name in files if name.startswith(FOLDER)])
    way = random.randrange(8)
    if way == 0:
        del files[name]
    elif way == 1:
        files[name] = random.choice((b"", b"{}", b"[]", b"null", b"\0" * 100))
    elif name.endswith(".json") and way % 2:
        files[name] = json.dumps(spoiled_value(random, json.loads(files[name]))).encode()
    else:
        files[name] = spoiled_bytes(random, files[name])
    argv = ("train", "recipe.yaml", "--max_steps", "3", "--resume_from_checkpoint", random.choice(("last", FOLDER)))
    return Input(argv=argv, files=files)


@contextlib.contextmanager
def before_first_step() -> Iterator[None]:
    """Trials end where the first step would compute."""

    def begin(*_: Any, **__: Any) -> Any:
        raise WorkBegins

    with mock.patch.object(MBPMixin, "training_step", begin):
        yield


@cache
def _right_run() -> Mapping[str, bytes]:
    """Files of a run of one step, with its recipe and data."""
    recipe = {
        **{"task": TASK, "output_dir": "run", "max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 2},
        **{"use_cpu": True, "report_to": "none", "disable_tqdm": True, "max_tokens_per_micro_batch": 64},
        **{"eval_before_training": False, "check_at_start": False, "learning_rate": "1e-3"},
        **tables.options(TASK),
    }
    lines = "".join(f"{key}: {json.dumps(value)}\n" for key, value in recipe.items())
    here = {"recipe.yaml": lines.encode(), **tables.right_files(TASK)}
    folder = Path("first_run")
    Input(files=here).write(folder)
    with inside(folder), contextlib.redirect_stdout(sys.stderr):
        if main(["train", "recipe.yaml"]) != 0:
            raise RuntimeError("the right run failed")
    return {**here, **{f"run/{name}": content for name, content in _files_in(folder / "run").items()}}
