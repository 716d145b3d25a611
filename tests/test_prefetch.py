"""The next micro-batch is copied before this one runs, and nothing else changes.

There is no GPU here: a device module that takes notes stands in for `torch.cuda`, and a kind of tensors for those on a
GPU: `meta` ones, to see what was moved, or those on the CPU, where a model has to run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import BertForSequenceClassification

from hf_mbp import prefetch, recovery
from hf_mbp.loop import run_mini_batch
from hf_mbp.prefetch import Prefetch
from hf_mbp.step import MicroBatch, as_shortest_filler
from tests.faults import Faults
from tests.helpers import Pad, Recorder, bert_config, build, mbp_trainer, relative_error, token_rows, with_labels

META = torch.device("meta")
ROWS = with_labels(token_rows(), lambda index, row: index % 2)


class Device:
    """Notes in which order inputs are pinned, copied, waited for and handed over."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self._is_aside = False

    class Stream:
        made = 0

        def __init__(self, device: torch.device) -> None:
            self.device = device
            Device.Stream.made += 1

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        assert isinstance(stream, Device.Stream)
        self.events.append("copy")
        self._is_aside = True
        yield
        self._is_aside = False

    def current_stream(self, device: torch.device) -> Any:
        return self

    def wait_stream(self, stream: Any) -> None:
        assert isinstance(stream, Device.Stream)
        self.events.append("wait")

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        assert self._is_aside
        self.events.append("pin")
        return tensor

    def record(self, tensor: torch.Tensor, stream: Any) -> None:
        assert stream is self
        self.events.append("record")


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Device]:
    """Has devices of a kind taken for GPUs."""

    def taken(kind: str) -> Device:
        notes = Device()
        prefetch._copying_stream.cache_clear()
        monkeypatch.setattr(Device.Stream, "made", 0)
        monkeypatch.setattr(prefetch, "HAVE_STREAMS", (kind,))
        monkeypatch.setattr(torch, "get_device_module", lambda _: notes)
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: notes.pin(tensor), raising=False)
        monkeypatch.setattr(
            torch.Tensor, "record_stream", lambda tensor, stream: notes.record(tensor, stream), raising=False
        )
        return notes

    return taken


def micro_batch(rows: int, **changes: Any) -> MicroBatch:
    inputs = {"input_ids": torch.ones(rows, 3, dtype=torch.long), "name": "x"}
    return MicroBatch(**{"inputs": inputs, "num_rows": rows, "num_items": rows, "cells": 3, "tokens": 3, **changes})


# By itself


def test_the_next_one_is_copied_before_this_one_runs(device: Callable[[str], Device]) -> None:
    gpu = device("meta")
    ahead = Prefetch(META, pins=True)
    first, idle, second, third = micro_batch(3), micro_batch(9, is_idle=True), micro_batch(2), micro_batch(1)
    ahead.start([idle, first, second, third])
    for current in (first, second, third):
        with ahead.on_device(current) as inputs:
            gpu.events.append(f"run {current.num_rows}")
            assert inputs["input_ids"].device == META
            assert inputs["input_ids"].shape == (current.num_rows, 3)
            assert inputs["name"] == "x"
        assert current.inputs["input_ids"].device.type == "cpu"
    copy, hand_over = ["copy", "pin"], ["wait", "record"]
    assert gpu.events == [
        *(*copy, *hand_over, *copy, "run 3"),
        *(*hand_over, *copy, "run 2"),
        *(*hand_over, "run 1"),
    ]


def test_there_is_one_stream_for_all_mini_batches(device: Callable[[str], Device]) -> None:
    """Each would keep memory of its own, and a loop without a Trainer copies each mini-batch anew."""
    device("meta")
    for _ in range(3):
        ahead, one = Prefetch(META, pins=True), micro_batch(2)
        ahead.start([one])
        with ahead.on_device(one) as inputs:
            assert inputs["input_ids"].device == META
    assert Device.Stream.made == 1


def test_memory_is_pinned_only_if_asked_for(device: Callable[[str], Device]) -> None:
    gpu = device("meta")
    ahead = Prefetch(META, pins=False)
    one = micro_batch(2)
    ahead.start([one])
    with ahead.on_device(one) as inputs:
        assert inputs["input_ids"].device == META
    assert gpu.events == ["copy", "wait", "record"]


def test_tensors_are_found_at_any_depth(device: Callable[[str], Device]) -> None:
    gpu = device("meta")
    ahead = Prefetch(META, pins=True)
    there, sparse = torch.ones(2, device=META), torch.eye(2).to_sparse()
    inputs = {"a": [torch.ones(1), {"b": (torch.ones(2), None)}], "there": there, "sparse": sparse}
    one = micro_batch(2, inputs=inputs)
    ahead.start([one])
    with ahead.on_device(one) as moved:
        assert [moved["a"][0].device, moved["a"][1]["b"][0].device] == [META, META]
        assert moved["a"][1]["b"][1] is None
        assert moved["there"] is there
        assert moved["sparse"] is sparse
    assert gpu.events.count("pin") == 2


def test_nothing_is_kept_of_a_pass_that_failed(device: Callable[[str], Device]) -> None:
    """Nor copied from there on: this rank only keeps in step with the others, if there are any."""
    gpu = device("meta")
    ahead = Prefetch(META, pins=True)
    first, second = micro_batch(2), micro_batch(1)
    ahead.start([first, second])
    held = []

    def fail() -> None:
        held.append(ahead._ahead)
        raise MemoryError

    with pytest.raises(MemoryError), ahead.on_device(first):
        fail()
    assert held[0] is not None
    assert ahead._ahead is None
    gpu.events.clear()
    with ahead.on_device(as_shortest_filler(second)) as inputs:
        assert inputs["input_ids"].device.type == "cpu"
    assert gpu.events == []
    ahead.start([second])
    with ahead.on_device(second) as inputs:
        assert inputs["input_ids"].device == META


def test_a_copy_without_memory_is_a_fault_of_the_one_that_runs(
    device: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    device("meta")

    def full(tensor: torch.Tensor) -> torch.Tensor:
        if len(tensor) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", full)
    ahead = Prefetch(META, pins=True)
    first, second = micro_batch(2), micro_batch(1)
    ahead.start([first, second])
    with pytest.raises(torch.OutOfMemoryError), ahead.on_device(first):
        raise AssertionError("not reached")
    assert ahead._ahead is None


def test_a_cpu_has_nothing_to_copy() -> None:
    ahead = Prefetch(torch.device("cpu"), pins=True)
    one = micro_batch(2)
    ahead.start([one, micro_batch(1)])
    with ahead.on_device(one) as inputs:
        assert inputs == one.inputs
        assert inputs is not one.inputs  # losses take things out of them
    assert ahead._ahead is None


# In a step


def trained(folder: Path, gpu: Device | None = None, faults_in: set[int] | None = None) -> Any:
    """The trainer after two steps of 16 rows; the forward passes are among the notes of the device."""
    recorder = Recorder()
    model = build(BertForSequenceClassification, bert_config())
    trainer = mbp_trainer(model, ROWS, folder, check_at_start=False, callbacks=[recorder], max_steps=2)
    trainer.recorder = recorder
    if gpu is not None:
        model.register_forward_pre_hook(lambda *_: gpu.events.append("run"))
    if faults_in is not None:
        Faults(model.bert.encoder.layer[0], "backward", faults_in).install(model)
    trainer.train()
    return trainer


def test_a_run_copies_every_micro_batch_one_ahead(device: Callable[[str], Device], tmp_path: Path) -> None:
    expected = trained(tmp_path).recorder
    gpu = device("cpu")
    ours = trained(tmp_path, gpu).recorder
    counts = [int(log["mbp_micro_batches"]) for log in ours.logs]
    assert min(counts) > 2
    order = [event for event in gpu.events if event in ("copy", "run")]
    assert order == [event for count in counts for event in ["copy", *["copy", "run"] * (count - 1), "run"]]
    for before, after in zip(expected.gradients, ours.gradients, strict=True):
        assert relative_error(before, after) == 0


def test_recovery_lets_go_of_what_was_copied_ahead(
    device: Callable[[str], Device], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    expected = trained(tmp_path, faults_in={1}).recorder
    gpu = device("cpu")
    held: list[Any] = []
    runners: list[Prefetch] = []
    start = Prefetch.start
    monkeypatch.setattr(Prefetch, "start", lambda ahead, run: (runners.append(ahead), start(ahead, run))[1])
    monkeypatch.setattr(recovery, "give_back_memory", lambda: held.append(runners[-1]._ahead))
    ours = trained(tmp_path, gpu, faults_in={1}).recorder
    assert held == [None, None]
    assert ours.logs[0]["mbp_oom_retries"] == 1
    assert relative_error(expected.gradients[0], ours.gradients[0]) == 0
    copies_of_second_attempt = int(ours.logs[0]["mbp_micro_batches"])
    in_first_step = gpu.events[: -_events_of(ours.logs[1])]
    assert in_first_step.count("copy") == 3 + copies_of_second_attempt


def _events_of(log: dict[str, float]) -> int:
    """Of a step without a fault: each micro-batch is copied, waited for, recorded (3 tensors), and run."""
    return int(log["mbp_micro_batches"]) * (1 + 1 + 3 + 1)


def test_a_loop_of_ones_own_copies_ahead_too(device: Callable[[str], Device]) -> None:
    gpu = device("cpu")
    model = build(BertForSequenceClassification, bert_config())
    model.register_forward_pre_hook(lambda *_: gpu.events.append("run"))
    report = run_mini_batch(
        ROWS,
        model=model,
        loss=lambda inputs: model(**inputs).loss,
        collate_fn=Pad(),
        accelerator=Accelerator(cpu=True),
        max_tokens=64,
    )
    count = report.num_micro_batches
    assert count > 2
    order = [event for event in gpu.events if event in ("copy", "run")]
    assert order == ["copy", *["copy", "run"] * (count - 1), "run"]
