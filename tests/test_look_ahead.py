"""The next step is prepared before this one is over, and nothing else changes.

There is no GPU here: the CPU is taken for a device that works off a queue.
"""

import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from transformers import BertForMaskedLM, DataCollatorForLanguageModeling, TrainerCallback

from hf_mbp import MBPTrainer, look_ahead
from hf_mbp.look_ahead import ReadAhead
from tests.faults import Faults
from tests.helpers import DROPOUT, bert_config, build, mbp_trainer, token_rows, tokenizer
from tests.simulated_ranks import AverageGradients, MBPOnRank, World

RUN = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "max_steps": -1,
    "num_train_epochs": 2,
    "optim": "adamw_torch",
    "check_at_start": False,
}
"""56 rows: three steps an epoch and one of a single batch."""

MEASURED = ("runtime", "per_second", "max_tokens")
"""How entries of the log end that differ from run to run, the last where it is sized from memory."""


@pytest.fixture
def looks_ahead(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Has this CPU taken for a GPU, or not."""

    def takes(is_gpu: bool) -> None:
        monkeypatch.setattr(look_ahead, "HAVE_STREAMS", ("cpu",) if is_gpu else ("cuda",))

    return takes


class Rows:
    """Rows of a data set; notes which of them are read."""

    def __init__(self, count: int = 56, events: list[Any] | None = None) -> None:
        self.rows = token_rows(count)
        self.events: list[Any] = [] if events is None else events

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        self.events.append(index)
        return self.rows[index]


class Masks(DataCollatorForLanguageModeling):
    """Masks words by random numbers that are drawn by torch and by Python, fewer the more often it was called."""

    def __init__(self, events: list[Any] | None = None) -> None:
        super().__init__(tokenizer(), mlm_probability=0.3)
        self.note = [].append if events is None else events.append
        self.drop = 0.1
        self.calls: list[int] = []

    def __call__(self, rows: list[Any], return_tensors: Any = None) -> Any:
        self.note("pad")
        self.calls.append(len(rows))
        batch = super().__call__(rows)
        for labels in batch["labels"]:
            if random.random() < self.drop:
                labels[2 + len(self.calls) :] = -100
        return batch


class Notes(TrainerCallback):
    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.events.append("step")


def masked_lm() -> Any:
    return build(BertForMaskedLM, bert_config(**DROPOUT)).float()


def trainer_of(folder: Path, rows: Any = None, *, model: Any = None, **changes: Any) -> Any:
    """Masked language modelling with dropout."""
    model = masked_lm() if model is None else model
    return mbp_trainer(model, Rows() if rows is None else rows, folder, **{"data_collator": Masks(), **RUN, **changes})


def trained(folder: Path, rows: Any = None, *, resume_from: str | None = None, **changes: Any) -> Any:
    trainer = trainer_of(folder, rows, **changes)
    trainer.train(resume_from_checkpoint=resume_from)
    return trainer


def logs_of(trainer: Any) -> list[dict[str, Any]]:
    history = trainer.state.log_history
    return [{name: value for name, value in entry.items() if not name.endswith(MEASURED)} for entry in history]


def assert_same_run(one: Any, other: Any) -> None:
    """The same weights, logs and random numbers, bit for bit."""
    torch.testing.assert_close(one.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    one_log, other_log = [
        [
            {name: value for name, value in entry.items() if not name.endswith(MEASURED)}
            for entry in run.state.log_history
        ]
        for run in (one, other)
    ]
    assert one_log == other_log


# When


def order_of_events(folder: Path) -> list[str]:
    """In an epoch of four steps, each of four rows in one micro-batch."""
    events: list[Any] = []
    trained(
        folder,
        Rows(16, events),
        data_collator=Masks(events),
        callbacks=[Notes(events)],
        num_train_epochs=1,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_tokens_per_micro_batch=1000,
    )
    return ["read" if isinstance(event, int) else event for event in events]


def test_it_is_read_and_padded_before_the_optimizer_steps(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    """Accelerate reads a batch ahead by itself."""
    read = ["read"] * 4
    looks_ahead(False)
    assert order_of_events(tmp_path) == [
        *(*read, *read, "pad", "step"),
        *(*read, "pad", "step"),
        *(*read, "pad", "step"),
        *("pad", "step"),
    ]
    looks_ahead(True)
    assert order_of_events(tmp_path) == [
        *(*read, *read, "pad", *read, "pad", "step"),
        *(*read, "pad", "step"),
        *("pad", "step"),
        "step",
    ]


def test_a_cpu_has_nothing_to_wait_for(tmp_path: Path) -> None:
    trainer = trained(tmp_path, max_steps=2)
    assert trainer.mbp_feed.look_ahead._reader is None


# The same run


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1},
        {"dataloader_num_workers": 2},
        {"collate_in": "workers", "data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)},
        {"max_tokens_per_micro_batch": None, "memory_limit": "4GiB"},
        {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": token_rows(5)},
        {"max_steps": 3},
        {"dataloader_drop_last": True},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_as_without(changes: dict[str, Any], looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    runs = []
    for is_gpu in (False, True):
        looks_ahead(is_gpu)
        random.seed(0)
        runs.append(trained(tmp_path, **changes))
    assert_same_run(*runs)


def test_no_more_rows_are_read(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    """Not beyond the epoch, nor the last step; and each epoch in its own order."""
    for steps in (-1, 2, 5):
        read = []
        for is_gpu in (False, True):
            looks_ahead(is_gpu)
            rows = Rows()
            trained(tmp_path, rows, max_steps=steps)
            read.append(rows.events)
        assert read[0] == read[1]


def test_a_run_that_is_resumed(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    looks_ahead(True)
    collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3)
    whole = trained(tmp_path, data_collator=collator, save_strategy="steps", save_steps=1)
    for step in (2, 4, 5):
        resumed = trained(tmp_path, data_collator=collator, resume_from=f"{tmp_path}/checkpoint-{step}")
        assert resumed.state.global_step == whole.state.global_step == 8
        torch.testing.assert_close(resumed.model.state_dict(), whole.model.state_dict(), rtol=0, atol=0)


class StopsEpochs(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_epoch_stop = state.global_step % 2 == 0


def test_an_epoch_that_is_cut_short(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    """What was read of it is dropped."""
    runs = []
    for is_gpu in (False, True):
        looks_ahead(is_gpu)
        runs.append(trained(tmp_path, callbacks=[StopsEpochs()]))
    assert_same_run(*runs)
    assert runs[0].state.global_step == 4


# What changes between two steps


class Changes(TrainerCallback):
    """Does something to the trainer at the end of step 2."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change
        self.trainer: Any = None

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 2:
            self.change(self.trainer)


def drop_more(trainer: Any) -> None:
    trainer.data_collator.drop = 0.9


def forget_calls(trainer: Any) -> None:
    trainer.data_collator.calls.clear()


def exchange_collator(trainer: Any) -> None:
    trainer.data_collator = Masks()
    trainer.data_collator.drop = 0.9


def exchange_for_one_with_a_generator(trainer: Any) -> None:
    trainer.data_collator = DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3, seed=1)


def lower_budget(trainer: Any) -> None:
    trainer.mbp_feed.budget.shrink(4, 10)


@pytest.mark.parametrize(
    "change", [drop_more, forget_calls, exchange_collator, exchange_for_one_with_a_generator, lower_budget]
)
def test_what_was_prepared_is_made_anew(
    change: Callable[[Any], None], looks_ahead: Callable[[bool], None], tmp_path: Path
) -> None:
    runs = []
    for is_gpu, does in ((False, change), (True, change), (True, lambda _: None)):
        looks_ahead(is_gpu)
        changes = Changes(does)
        changes.trainer = trainer_of(tmp_path, callbacks=[changes])
        changes.trainer.train()
        runs.append(changes.trainer)
    assert_same_run(*runs[:2])
    with pytest.raises(AssertionError):
        assert_same_run(*runs[1:])


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_a_prepared_step_that_runs_out_of_memory(
    stage: str, looks_ahead: Callable[[bool], None], tmp_path: Path
) -> None:
    runs = []
    for is_gpu in (False, True):
        looks_ahead(is_gpu)
        model = masked_lm()
        faults = Faults(model.bert.encoder.layer[1], stage, {9}).install(model)
        runs.append(trained(tmp_path, model=model))
        assert faults.raised == 1
    assert_same_run(*runs)


# Errors


class Breaks(Rows):
    """Rows of which one cannot be read: the fourth batch has it, of an epoch in order."""

    def __getitem__(self, index: int) -> Any:
        if index == 30:
            raise OSError("row 30 cannot be read")
        return super().__getitem__(index)


class CannotPad(Masks):
    def __call__(self, rows: list[Any], return_tensors: Any = None) -> Any:
        if any(row["input_ids"] == token_rows(56)[30]["input_ids"] for row in rows):
            raise OSError("row 30 cannot be padded")
        return super().__call__(rows)


@pytest.mark.parametrize(("rows", "collator"), [(Breaks, Masks), (Rows, CannotPad)])
def test_an_error_comes_when_it_would(
    rows: Any, collator: Any, looks_ahead: Callable[[bool], None], tmp_path: Path
) -> None:
    ends = []
    for is_gpu in (False, True):
        looks_ahead(is_gpu)
        trainer = trainer_of(tmp_path, rows(), data_collator=collator(), train_sampling_strategy="sequential")
        with pytest.raises(OSError, match="row 30 cannot be"):
            trainer.train()
        ends.append(trainer)
    assert ends[0].state.global_step == ends[1].state.global_step == 1
    assert_same_run(*ends)


# Data that is not read before its time


class Stream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(token_rows(56))


class OwnLoader(MBPTrainer):
    """Pads its batches itself."""

    def get_train_dataloader(self) -> Any:
        return list(torch.utils.data.DataLoader(self.train_dataset, batch_size=8, collate_fn=Masks()))


class Yields:
    """A loader of four padded batches."""

    def __init__(self, events: list[Any]) -> None:
        self.events = events

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, 32, 8):
            self.events.append("yield")
            yield Masks()(token_rows(32)[start : start + 8])


def test_a_loader_of_ones_own_is_read_at_its_time(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    looks_ahead(True)
    events: list[Any] = []
    trainer = trainer_of(tmp_path, num_train_epochs=1, callbacks=[Notes(events)])
    trainer.get_train_dataloader = lambda: Yields(events)
    trainer.train()
    assert events == ["yield", "yield", "step"] * 2


def takes_of(trainer: Any) -> list[Any]:
    """What was prepared for each step, after training."""
    takes: list[Any] = []
    taken = trainer.mbp_feed.look_ahead.take

    def noted(batches: list[Any]) -> Any:
        takes.append(taken(batches))
        return takes[-1]

    trainer.mbp_feed.look_ahead.take = noted
    trainer.train()
    return takes


@pytest.mark.parametrize(
    "changes",
    [
        {"rows": Stream(), "max_steps": 4},
        {"trainer_class": OwnLoader},
        {"accelerator_config": {"dispatch_batches": True}},
        {"data_collator": DataCollatorForLanguageModeling(tokenizer(), mlm_probability=0.3, seed=1)},
    ],
    ids=["stream", "own loader", "dealt by the first rank", "generator of its own"],
)
def test_what_is_left_alone(changes: dict[str, Any], looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    looks_ahead(True)
    takes = takes_of(trainer_of(tmp_path, **changes))
    assert len(takes) >= 4
    assert not any(takes)


def test_not_while_the_cost_is_measured(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    looks_ahead(True)
    takes = takes_of(trainer_of(tmp_path, calibrate=True, max_steps=12))
    assert [take is not None for take in takes] == [False] * 11 + [True]


class Loading(TrainerCallback):
    """Keeps whether Accelerate still counts as reading when a step ends."""

    def __init__(self) -> None:
        self.is_reading: list[bool] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.is_reading.append(GradientState().in_dataloader)


def test_the_loader_is_not_ended_before_its_time(looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    seen = []
    for is_gpu in (False, True):
        looks_ahead(is_gpu)
        loading = Loading()
        trained(tmp_path, callbacks=[loading])
        seen.append(loading.is_reading)
    assert seen[0] == seen[1] == [True] * 8


# Several ranks


def of_ranks(folder: Path, count: int, budget: int) -> tuple[list[dict[str, torch.Tensor]], int]:
    """Weights of each rank after an epoch, and how often rows of a step were padded."""
    padded: list[int] = []

    def rank(world: World, index: int) -> dict[str, torch.Tensor]:
        trainer = trainer_of(
            folder / str(index),
            trainer_class=partial(MBPOnRank, world=world, index=index),
            callbacks=[AverageGradients(world, index)],
            max_tokens_per_micro_batch=budget,
            balance_ranks=False,
            train_sampling_strategy="sequential",
            num_train_epochs=1,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
        )
        pooling = trainer.mbp_feed._pooling
        pad = pooling._padded

        def noted(*args: Any) -> Any:
            padded.append(index)
            return pad(*args)

        pooling._padded = noted
        trainer.train()
        weights: dict[str, torch.Tensor] = trainer.model.state_dict()
        return weights

    world = World(count)
    return world.run(partial(rank, world)), len(padded)


@pytest.mark.parametrize("budget", [40, 1000])
def test_ranks(budget: int, looks_ahead: Callable[[bool], None], tmp_path: Path) -> None:
    """A rank that needs fewer micro-batches than another makes its plan anew; where all agree, it is used."""
    outcomes, times_padded = [], []
    for is_gpu in (False, True):
        looks_ahead(is_gpu)
        weights, padded = of_ranks(tmp_path, 2, budget)
        outcomes.append(weights)
        times_padded.append(padded)
    torch.testing.assert_close(*outcomes, rtol=0, atol=0)
    assert times_padded[0] == 14
    assert (times_padded[1] > 14) == (budget == 40)


# Reading


def test_an_iterator_that_was_read_ahead_gives_the_same() -> None:
    source = (number for number in range(5))
    reader = ReadAhead(source)
    assert reader.read(2, lambda: False) == [0, 1]
    assert reader.read(1, lambda: False) == [0]
    assert next(reader) == 0
    assert reader.read(3, lambda: True) == [1]
    assert reader.read(9, lambda: False) == [1, 2, 3, 4]
    assert list(reader) == [1, 2, 3, 4]
    assert reader.read(1, lambda: False) == []
    assert list(reader) == []


def test_an_iterator_that_fails_does_so_where_it_would() -> None:
    def numbers() -> Iterator[int]:
        yield 0
        raise OSError("broken")

    source = numbers()
    reader = ReadAhead(source)
    assert reader.read(3, lambda: False) == [0]
    assert next(reader) == 0
    with pytest.raises(OSError, match="broken"):
        next(reader)
    assert list(reader) == []


def test_a_reader_does_not_keep_what_it_reads_from() -> None:
    """Or the workers of a data loader would live on beside those of the next epoch."""
    reader = ReadAhead(number for number in range(5))
    assert reader.read(2, lambda: False) == []
    assert list(reader) == []
