"""Runs on several processes, each compared with plain PyTorch on the rows of all of them."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import torch
from datasets import Dataset
from transformers import BertForTokenClassification, LlamaForCausalLM, PreTrainedModel

from tests.helpers import bert_config, build, llama_config, masked_prefix, token_rows, with_labels

Row = dict[str, list[int]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run.

    `strategy` is how the model is distributed; `data` in what the rows come; `rows` how many there are. `accelerator`
    and `arguments` go to `TrainingArguments`, `padding_free` to `MBPConfig`. Cases of a rank with few rows or items do
    not balance the ranks: it would get more.
    """

    strategy: str = "ddp"
    data: str = "list"
    rows: int = 35
    labels: str = "some"
    model: str = "bert"
    padding_side: str = "right"
    accelerator: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    balance: bool = True
    resumes: bool = False
    padding_free: bool | None = None

    @property
    def is_stream(self) -> bool:
        return self.data in ("stream", "shards")

    @property
    def is_zero(self) -> bool:
        return self.strategy in ("zero1", "zero2", "zero3")

    @property
    def is_in_float64(self) -> bool:
        """Llama computes its loss in float32, DeepSpeed its weights."""
        return self.model != "llama" and not self.is_zero

    @property
    def accumulation(self) -> int:
        return int(self.arguments.get("gradient_accumulation_steps", 1))


class Stream(torch.utils.data.IterableDataset[Row]):
    """Rows whose number is only known at their end."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


UNEVEN = {"even_batches": False}
OWN_SHARE = {"dispatch_batches": False}
DISPATCHED = {"dispatch_batches": True}
SPLIT = {"split_batches": True}
TWICE = {"gradient_accumulation_steps": 2}

ON_TWO = {
    "even": Case(),
    "even, accumulated": Case(arguments=TWICE),
    "not balanced": Case(balance=False),
    "not balanced, accumulated": Case(balance=False, arguments=TWICE),
    "balanced, uneven": Case(accelerator=UNEVEN),
    "balanced, uneven, accumulated": Case(accelerator=UNEVEN, rows=37, arguments=TWICE),
    "balanced, padded in workers": Case(data="collated in workers", arguments=TWICE),
    "drop_last": Case(arguments={"dataloader_drop_last": True}),
    "the last rank has no batch": Case(accelerator=UNEVEN, balance=False),
    "the last rank has no batch, a table": Case(accelerator=UNEVEN, balance=False, data="table"),
    "the last rank has no batch, accumulated": Case(accelerator=UNEVEN, balance=False, arguments=TWICE),
    "the last rank has one row": Case(accelerator=UNEVEN, balance=False, rows=37),
    "the last rank has no row at all": Case(accelerator=UNEVEN, balance=False, rows=3),
    "the last rank has no batch, padded in workers": Case(
        accelerator=UNEVEN, balance=False, data="collated in workers"
    ),
    "split": Case(accelerator=SPLIT, arguments={"per_device_train_batch_size": 8}),
    "split, uneven": Case(accelerator=SPLIT | UNEVEN, arguments={"per_device_train_batch_size": 8}),
    "dispatched": Case(accelerator=DISPATCHED),
    "dispatched, drop_last": Case(accelerator=DISPATCHED, arguments={"dataloader_drop_last": True}),
    "a stream": Case(data="stream"),
    "a stream of one row": Case(data="stream", rows=1),
    "a stream, workers": Case(data="stream", arguments={"dataloader_num_workers": 1}),
    "a stream, accumulated": Case(data="stream", arguments=TWICE),
    "a stream, split": Case(data="stream", accelerator=SPLIT, arguments={"per_device_train_batch_size": 8}),
    "a stream, drop_last": Case(data="stream", arguments={"dataloader_drop_last": True}),
    "a stream, resumed": Case(data="stream", resumes=True),
    "a stream, each its share": Case(data="stream", accelerator=OWN_SHARE),
    "a stream of shards": Case(data="shards", accelerator=OWN_SHARE),
    "a stream of shards, accumulated": Case(data="shards", accelerator=OWN_SHARE, arguments=TWICE),
    "a stream of shards, dispatched": Case(data="shards"),
    "a rank without items": Case(labels="none on the second rank", balance=False),
    "synchronised after each": Case(
        accelerator={"gradient_accumulation_kwargs": {"sync_each_batch": True}}, arguments=TWICE
    ),
    "causal, padded left": Case(model="llama", padding_side="left"),
    "causal, end to end": Case(model="llama", padding_free=True),
    "causal, end to end, padded left, the last rank has no batch": Case(
        model="llama", padding_free=True, padding_side="left", accelerator=UNEVEN, balance=False
    ),
}

FSDP2 = {
    "fsdp2": Case(strategy="fsdp2"),
    "fsdp2, accumulated": Case(strategy="fsdp2", arguments=TWICE),
    "fsdp2, the last rank has no batch": Case(strategy="fsdp2", accelerator=UNEVEN, balance=False),
    "fsdp2, a rank without items": Case(strategy="fsdp2", labels="none on the second rank", balance=False),
    "fsdp2, a stream": Case(strategy="fsdp2", data="stream"),
    "fsdp2, causal, padded left": Case(strategy="fsdp2", model="llama", padding_side="left"),
    "fsdp2, causal, end to end, the last rank has no batch": Case(
        strategy="fsdp2", model="llama", padding_free=True, accelerator=UNEVEN, balance=False
    ),
    "fsdp2, synchronised after each": Case(
        strategy="fsdp2", accelerator={"gradient_accumulation_kwargs": {"sync_each_batch": True}}
    ),
}

ON_FOUR = {
    "even, on four": Case(),
    "only the first rank has a batch": Case(accelerator=UNEVEN, balance=False, rows=19),
    "a stream, on four": Case(data="stream"),
    "a stream of shards, on four": Case(data="shards", accelerator=OWN_SHARE),
    "fsdp2, on four": Case(strategy="fsdp2"),
    "hsdp": Case(strategy="hsdp"),
    "hsdp, only the first rank has a batch": Case(strategy="hsdp", accelerator=UNEVEN, balance=False, rows=19),
}

ZERO = {
    f"{stage}{', ' if what else ''}{what}": Case(strategy=stage, **changes)
    for stage in ("zero2", "zero3")
    for what, changes in {
        "": {},
        "accumulated": {"arguments": TWICE},
        "the last rank has no batch": {"accelerator": UNEVEN, "balance": False},
        "a rank without items": {"labels": "none on the second rank", "balance": False},
        "a stream": {"data": "stream"},
        "causal, padded left": {"model": "llama", "padding_side": "left"},
    }.items()
}

ZERO |= {"zero1": Case(strategy="zero1"), "zero1, accumulated": Case(strategy="zero1", arguments=TWICE)}

CASES = ON_TWO | FSDP2 | ON_FOUR | ZERO


def model_of(case: Case) -> PreTrainedModel:
    """The untrained model, in float64."""
    if case.model == "llama":
        return build(LlamaForCausalLM, llama_config())
    return build(BertForTokenClassification, bert_config(num_labels=3))


def distributed_model_of(case: Case) -> PreTrainedModel:
    """The same as it is given to the trainer: ZeRO-3 takes no float64."""
    return model_of(case).float() if case.is_zero else model_of(case)


def rows_of(case: Case) -> list[Row]:
    """Rows of very uneven lengths, all different; only some of their tokens have labels."""
    rows = token_rows(case.rows)
    if case.model == "llama":
        return with_labels(rows, masked_prefix)

    def label(index: int, row: Row) -> list[int]:
        is_empty = case.labels != "some" and index % 8 >= 4
        return [-100 if is_empty or token % 3 == 0 else token % 3 for token in row["input_ids"]]

    return with_labels(rows, label)


def data_of(case: Case) -> Any:
    """The rows as a data set of the case's kind."""
    rows = rows_of(case)
    if case.data == "stream":
        return Stream(rows)
    if case.data == "table":
        return Dataset.from_list(rows)
    if case.data == "shards":
        return Dataset.from_list(rows).to_iterable_dataset(num_shards=5)
    return rows


def steps_of(case: Case, ranks: list[list[list[list[int]]]]) -> list[list[int]]:
    """Rows of each optimizer step on all ranks together, from the batches that each rank reads in each epoch.

    A step that the end of a stream cuts short waits for the next epoch.
    """
    steps: list[list[int]] = []
    waiting: list[int] = []
    for epoch in zip(*ranks, strict=True):
        together = [list(chain.from_iterable(batches)) for batches in zip_longest(*epoch, fillvalue=[])]
        for start in range(0, len(together), case.accumulation):
            part = together[start : start + case.accumulation]
            waiting += chain.from_iterable(part)
            if len(part) == case.accumulation or not case.is_stream:
                steps.append(waiting)
                waiting = []
    return steps
