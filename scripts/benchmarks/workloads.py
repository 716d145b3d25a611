"""Workloads: what rows there are, what for, and how many are a step."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks import lengths
from benchmarks.rows import CLASSES, Rows, rows_to_classify, rows_to_continue
from benchmarks.sizes import Size


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Rows of an optimizer step: `rows_per_batch x batches`, `per_device_train_batch_size x accumulation`.

    Example:
        >>> Shape.parse("8x4").rows_per_step
        32
    """

    rows_per_batch: int
    batches: int

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Reads `8x4`; raises `ValueError` for anything else."""
        match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise ValueError(
                f"{text!r} is not per_device_train_batch_size x gradient_accumulation_steps; write for example 8x4"
            )
        return cls(rows_per_batch=int(match[1]), batches=int(match[2]))

    @property
    def rows_per_step(self) -> int:
        """Rows of a mini-batch."""
        return self.rows_per_batch * self.batches

    def __str__(self) -> str:
        return f"{self.rows_per_batch}x{self.batches}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """As many row lengths as there are rows in an epoch, and what is learned from rows of them.

    `lengths` makes them anew, alike. `size` names the model, if no other is asked for.
    """

    name: str
    what: str
    lengths: Callable[[], list[int]]
    shapes: tuple[str, ...]
    size: str = "minilm"
    is_language_model: bool = False

    def rows(self, size: Size) -> Rows:
        """Rows for a model."""
        make = rows_to_continue if self.is_language_model else rows_to_classify
        return make(self.lengths(), size.vocabulary)

    def untrained_loss(self, size: Size) -> float:
        """Of a model that has no preference yet; random weights have a slight one."""
        return math.log(size.vocabulary if self.is_language_model else CLASSES)


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            name="lognormal",
            what="192 rows of lognormal(4.2, 0.8) lengths, clipped to 8..512",
            lengths=lambda: lengths.lognormal(192, 4.2, 0.8, 8, 512),
            shapes=("4x16", "8x8", "64x1"),
        ),
        Workload(
            name="large_steps",
            what="768 rows of lognormal(4.2, 0.8) lengths, clipped to 8..512, in steps of 256",
            lengths=lambda: lengths.lognormal(768, 4.2, 0.8, 8, 512),
            shapes=("8x32",),
        ),
        Workload(
            name="equal",
            what="192 rows of 128 tokens each, as a control: nothing to gain",
            lengths=lambda: [128] * 192,
            shapes=("8x8",),
        ),
        Workload(
            name="spam",
            what="lengths of 128 e-mails of SpamAssassin, in words and punctuation marks, cut at 256",
            lengths=lambda: lengths.of_texts("spam-train.jsonl.xz", "text", 128),
            shapes=("8x8", "64x1"),
        ),
        Workload(
            name="jargon",
            what="lengths of 128 entries of the Jargon File, in words and punctuation marks, cut at 256",
            lengths=lambda: lengths.of_texts("jargon-train.jsonl.xz", "definition", 128),
            shapes=("8x8", "64x1"),
            is_language_model=True,
        ),
        Workload(
            name="functions",
            what="lengths of 128 functions of the Python standard library, each with its docstring, in words and "
            "punctuation marks, cut at 512",
            lengths=lambda: lengths.of_functions(128, 512),
            shapes=("8x8", "64x1"),
            is_language_model=True,
        ),
        Workload(
            name="brown",
            what="lengths of 32 documents of the Brown corpus, the first quarter of each, as a control: they vary by "
            "3.6 %, and there is little to gain",
            lengths=lambda: lengths.of_documents(32, 0.25),
            shapes=("2x8",),
            is_language_model=True,
        ),
        Workload(
            name="tiny",
            what="24 rows of lognormal(2.5, 0.8) lengths, clipped to 4..48; for a first try",
            lengths=lambda: lengths.lognormal(24, 2.5, 0.8, 4, 48),
            shapes=("2x4", "8x1"),
            size="tiny",
        ),
        Workload(
            name="tiny_lm",
            what="24 rows of lognormal(2.5, 0.8) lengths, clipped to 4..48; for a first try",
            lengths=lambda: lengths.lognormal(24, 2.5, 0.8, 4, 48),
            shapes=("2x4", "8x1"),
            size="tiny",
            is_language_model=True,
        ),
    )
}
"""Another one needs an entry here. All rows of a workload are an epoch, which has to be whole optimizer steps."""
