"""What the steps did: numbers for the logs, and a line for the reader."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from hf_mbp.arrays import Ints
from hf_mbp.distributed import Ranks
from hf_mbp.recovery import Fault
from hf_mbp.step import MicroBatch

MEASURED = ("mbp_tokens_per_second", "mbp_overhead_fraction", "mbp_peak_memory_bytes")
"""Log entries that differ from run to run."""


STEPS_TO_JUDGE = 10
"""Steps after which it can be said what takes their time: the first one also holds the check and the sizing."""

SLOW_COLLATION = 0.1
"""Share of the time of a step from which collation is worth moving to the workers."""

PADDED_ROWS = 0.05
"""Share of padding in rows as they come from the data set from which the reader is told."""


@dataclass
class Counts:
    """Sums over a number of optimizer steps, on this rank."""

    steps: int = 0
    micro_batches: int = 0
    cells: int = 0
    tokens: int = 0
    unsplit_cells: int = 0
    seconds: float = 0.0
    collation_seconds: float = 0.0
    overhead_seconds: float = 0.0
    oom_retries: int = 0

    def add(self, other: "Counts") -> None:
        """Adds another count to this one."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def over(self, ranks: Ranks) -> "Counts":
        """Of all ranks: cells and tokens are added up, steps, micro-batches and seconds are those of the slowest.

        Overhead is that of the rank with the least, because the others also wait for it in theirs; what delays all is
        in that of all.
        """
        gathered = zip(*ranks.gather(*vars(self).values()), strict=True)
        values = dict(zip(vars(self), gathered, strict=True))
        merge: dict[str, Any] = {"cells": sum, "tokens": sum, "unsplit_cells": sum, "overhead_seconds": min}
        merged = {name: merge.get(name, max)(numbers) for name, numbers in values.items()}
        return Counts(**{name: value if "seconds" in name else int(value) for name, value in merged.items()})

    @property
    def tokens_per_second(self) -> float:
        """Tokens that are not padding, a second; 0 if no time was measured."""
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def overhead_fraction(self) -> float:
        """Share of the time of the steps that was neither forward, backward nor optimizer, but this library's own."""
        return self.overhead_seconds / self.seconds if self.seconds else 0.0

    @property
    def padding_fraction(self) -> float:
        """Share of the cells that were padding."""
        return 1 - self.tokens / self.cells if self.cells else 0.0

    @property
    def padding_fraction_unsplit(self) -> float:
        """Share that would have been padding, had each batch been padded to its longest row, as usual."""
        return max(0.0, 1 - self.tokens / self.unsplit_cells) if self.unsplit_cells else 0.0


class StepReport:
    """Collects the steps since the last log, and all of the run."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets all steps."""
        self.since_log = Counts()
        self.total = Counts()
        self._planned = Counts()
        self.max_tokens = 0
        self._started: float | None = None

    def start_step(self) -> None:
        """Starts the clock of a step; it runs until `stop_clock`, so that evaluation and saving are not counted."""
        self.stop_clock()
        self._started = time.perf_counter()

    def stop_clock(self) -> None:
        """Stops the clock of a step; to be called before stock logs, evaluates and saves."""
        if self._started is not None:
            self.since_log.seconds += time.perf_counter() - self._started
            self._started = None

    @contextmanager
    def collation(self) -> Iterator[None]:
        """Around a call of the user's collator in the main process."""
        started = time.perf_counter()
        yield
        self.since_log.collation_seconds += time.perf_counter() - started

    @contextmanager
    def overhead(self) -> Iterator[None]:
        """Around what this library does in a step, from reading its rows on: host time, but for what is `computing`."""
        started = time.perf_counter()
        yield
        self.since_log.overhead_seconds += time.perf_counter() - started

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within `overhead`: around forward and backward passes of the next class, and the reduction of gradients."""
        started = time.perf_counter()
        try:
            yield
        finally:  # a pass that runs out of memory is survived
            self.since_log.overhead_seconds -= time.perf_counter() - started

    def slow_collation_note(self) -> str | None:
        """What to do about collation that takes much of the time, once there were enough steps to tell."""
        steps = self.total.steps + self.since_log.steps
        seconds = self.total.seconds + self.since_log.seconds
        collation_seconds = self.total.collation_seconds + self.since_log.collation_seconds
        if steps < STEPS_TO_JUDGE or collation_seconds <= SLOW_COLLATION * seconds:
            return None
        return (
            f"hf_mbp: {collation_seconds / seconds:.0%} of the time goes into the data collator, in the main process. "
            "MBPConfig(collate_in='workers') with dataloader_num_workers runs it beside the training."
        )

    def plan_step(self, micro_batches: list[MicroBatch], batches: list[Ints], max_tokens: int) -> None:
        """Notes the micro-batches of a step and, to compare, the row sizes of its batches as they were read.

        A step counts once it has been run, as it was planned last.
        """
        self.max_tokens = max_tokens
        self._planned = counts_of(micro_batches, batches)

    def retry(self) -> None:
        """Notes that memory ran out, and the step is run again."""
        self.since_log.oom_retries += 1

    def count_step(self) -> None:
        """Counts the step that was planned last: it has been run."""
        self.since_log.add(self._planned)
        self._planned = Counts()

    def flush(self, ranks: Ranks, peak_bytes: int) -> dict[str, float]:
        """Log entries for the steps since the last call; to be called by all ranks."""
        self.total.add(self.since_log)
        counts, self.since_log = self.since_log.over(ranks), Counts()
        return {
            "mbp_micro_batches": counts.micro_batches / max(counts.steps, 1),
            "mbp_padding_fraction": counts.padding_fraction,
            "mbp_tokens_per_second": counts.tokens_per_second,
            "mbp_overhead_fraction": counts.overhead_fraction,
            "mbp_cells": counts.cells,
            "mbp_tokens": counts.tokens,
            "mbp_max_tokens": self.max_tokens,
            "mbp_peak_memory_bytes": peak_bytes,
            "mbp_oom_retries": counts.oom_retries,
        }

    def totals(self, ranks: Ranks) -> dict[str, float]:
        """Metrics of the whole run, for the end of training; to be called by all ranks."""
        self.total.add(self.since_log)
        counts, self.since_log = self.total.over(ranks), Counts()
        return {
            "mbp_micro_batches": counts.micro_batches / max(counts.steps, 1),
            "mbp_cells": counts.cells,
            "mbp_tokens": counts.tokens,
            "mbp_padding_fraction": counts.padding_fraction,
            "mbp_padding_fraction_unsplit": counts.padding_fraction_unsplit,
            "mbp_tokens_per_second": counts.tokens_per_second,
            "mbp_overhead_fraction": counts.overhead_fraction,
            "mbp_oom_retries": counts.oom_retries,
        }


def counts_of(micro_batches: list[MicroBatch], batches: list[Ints]) -> Counts:
    """Of one step, in micro-batches, whose rows were read in batches of the given sizes."""
    return Counts(
        steps=1,
        micro_batches=len(micro_batches),
        cells=sum(micro_batch.cells for micro_batch in micro_batches),
        tokens=sum(micro_batch.tokens for micro_batch in micro_batches),
        unsplit_cells=sum(int(len(sizes) * sizes.max(axis=0).sum()) for sizes in batches),
    )


def start_line(
    num_rows: int, micro_batches: list[MicroBatch], sizes: list[Ints], budget: str, check: str, *, num_ranks: int = 1
) -> str:
    """What will happen, in words, from the first step of the first rank."""
    step = counts_of(micro_batches, sizes)
    where = "" if num_ranks == 1 else f" on the first of {num_ranks:,} processes"
    return (
        f"hf_mbp: {num_rows:,} rows a step{where} run as {_counted(micro_batches)} ({budget}). "
        f"Padding in the first step: {step.padding_fraction:.1%} of {step.cells:,} cells; "
        f"{step.padding_fraction_unsplit:.1%} of {step.unsplit_cells:,} without splitting. {check}"
    )


def retry_line(step: int, faults: list[Fault], micro_batches: list[MicroBatch]) -> str:
    """What happened when memory ran out, and what is done about it."""
    fault = next((fault for fault in faults if fault.reason), faults[0])
    where = f" on process {fault.rank}" if fault.rank else ""
    reason = f" ({fault.reason})" if fault.reason else ""
    how = f"in {_counted(micro_batches)}"
    if any(micro_batch.is_checkpointed for micro_batch in micro_batches):
        how += ", those of the longest rows with activation checkpointing"
    return f"hf_mbp: step {step}: no memory{where} for {fault}{reason}. The step is run again from its start, {how}."


def hidden_loss(step: int, loss: float) -> str:
    """What a loss that is no finite number means, which stock keeps out of the logs."""
    return (
        f"Step {step}: the loss is {loss}, which logging_nan_inf_filter keeps out of the logs. The weights, and "
        "checkpoints from here on, may hold no numbers any more. Go on from an earlier checkpoint, with a lower "
        "learning_rate or without the rows that do this."
    )


def compiled_note() -> str:
    """What compilation makes of micro-batches of changing shapes."""
    return (
        "hf_mbp: the model is compiled for any number of rows and any width, and micro-batches are padded no further "
        "for it; those of a single row compile once more."
    )


def balance_note(num_ranks: int, why_not: str | None) -> str:
    """How the rows of a step are dealt to several processes."""
    if why_not is None:
        return (
            f"hf_mbp: the rows of a step are dealt to {num_ranks:,} processes by their cost, so that none waits long "
            "for another."
        )
    return (
        f"hf_mbp: rows are not dealt to processes by their cost, because {why_not}: a process with longer rows makes "
        "the others wait."
    )


def half_precision_note(dtypes: list[str], num_micro_batches: int) -> str | None:
    """What to do about gradients that are summed in half precision, as the weights are; `dtypes` names which."""
    if not dtypes or num_micro_batches < 2:
        return None
    return (
        f"hf_mbp: the weights are {' and '.join(dtypes)}, and so is the sum of the gradients of the micro-batches, "
        "which loses digits with every one. MBPConfig(accumulate_in_fp32=True) sums them in float32; loading the model "
        "with dtype='float32' and training with bf16=True keeps the weights in float32, too. See docs/precision.md."
    )


def padded_rows_note(micro_batches: list[MicroBatch], sizes: list[Ints]) -> str | None:
    """What to do about rows that are padded when they come from the data set; `sizes` are theirs."""
    tokens = sum(micro_batch.tokens for micro_batch in micro_batches)
    came = sum(int(batch.sum()) for batch in sizes)
    if tokens >= (1 - PADDED_ROWS) * came:
        return None
    return (
        f"hf_mbp: {1 - tokens / came:.0%} of the tokens in these rows is padding that they came with. Tokenise without "
        "padding (not padding='max_length'), and let the data collator pad."
    )


def _counted(micro_batches: list[MicroBatch]) -> str:
    return "1 micro-batch" if len(micro_batches) == 1 else f"{len(micro_batches):,} micro-batches"
