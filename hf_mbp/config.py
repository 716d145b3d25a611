"""The options of micro-batch processing."""

from dataclasses import dataclass, field

from hf_mbp.byte_sizes import parse_memory_limit
from hf_mbp.plan import check_max_tokens

ON_INEXACT = ("warn", "error")
COLLATE_IN = ("main", "workers")


@dataclass(frozen=True, kw_only=True)
class MBPConfig:
    """Options of `MBPTrainer`; every one has a default that is right for most runs.

    Fields can be read from a command line or a YAML file by `transformers.HfArgumentParser`.

    Raises:
        ValueError: an option is out of range; the message says what to write instead.

    Example:
        >>> MBPConfig(max_tokens_per_micro_batch=8192).max_tokens_per_micro_batch
        8192
        >>> MBPConfig(memory_limit="much")
        Traceback (most recent call last):
        ValueError: memory_limit='much' is neither a size nor a fraction of the device's memory. Write for example \
memory_limit="20GiB", or memory_limit=0.8 for 80 % of the memory.
    """

    max_tokens_per_micro_batch: int | None = field(
        default=None,
        metadata={"help": "Most padded tokens (rows x width) a micro-batch may have. Default: sized from the memory."},
    )
    memory_limit: float | str | None = field(
        default=None,
        metadata={
            "help": 'Memory that each process stays under on its device: a size such as "20GiB", or a fraction of '
            "the device's memory (of its part of a CPU's) such as 0.8. Default: 0.9 of what is free when training "
            "starts."
        },
    )
    check_at_start: bool = field(
        default=True,
        metadata={"help": "Compare, before the first step, the split gradient with the whole one on a few short rows."},
    )
    on_inexact: str = field(
        default="warn",
        metadata={"help": "What to do if that comparison fails: 'warn' or 'error'.", "choices": list(ON_INEXACT)},
    )

    collate_in: str = field(
        default="main",
        metadata={
            "help": "Where the collator runs: 'main' pads each micro-batch by itself; 'workers' pads whole batches in "
            "the data loader's workers, from which micro-batches are cut: for slow collators (images, sounds).",
            "choices": list(COLLATE_IN),
        },
    )
    accumulate_in_fp32: bool = field(
        default=False,
        metadata={
            "help": "Sum the gradients of bfloat16 and float16 weights in float32, and round once a step. Takes 4 "
            "bytes for each such weight. Changes nothing for float32 weights."
        },
    )

    balance_ranks: bool = field(
        default=True,
        metadata={
            "help": "Deal the rows of a step to processes by their cost, so that none waits long for another. Which "
            "rows a step has does not change. Where their lengths are not known beforehand, nothing is done."
        },
    )

    padding_free: bool | None = field(
        default=None,
        metadata={
            "help": "Lay the rows of a micro-batch end to end instead of padding them. Default: under flash attention, "
            "where that was checked to be exact. True: under any attention, or refuse to train. False: never."
        },
    )

    calibrate: bool = field(
        default=False,
        metadata={
            "help": "Measure in the first 10 steps what micro-batches cost, and plan by that from then on. Checkpoints "
            "keep what was measured, so that a resumed run makes the same plans; another run measures anew, and may "
            "make others. Default: plans come from the shape of the model and the kind of device, and are repeatable."
        },
    )

    rank_timeout: float = field(
        default=60.0,
        metadata={
            "help": "Seconds within which the failure of one of several processes ends all of them, with its cause. "
            "0 turns that off: they then wait for ddp_timeout."
        },
    )

    def __post_init__(self) -> None:
        if self.max_tokens_per_micro_batch is not None:
            check_max_tokens(self.max_tokens_per_micro_batch, "max_tokens_per_micro_batch")
            # A NumPy integer would not go into the JSON of a checkpoint.
            object.__setattr__(self, "max_tokens_per_micro_batch", int(self.max_tokens_per_micro_batch))
        parse_memory_limit(self.memory_limit)
        for name in ("accumulate_in_fp32", "balance_ranks", "calibrate"):
            if not isinstance(value := getattr(self, name), bool):
                raise ValueError(f"{name}={value!r} is neither True nor False. Write one.")
        if self.padding_free is not None and not isinstance(self.padding_free, bool):
            raise ValueError(f"padding_free={self.padding_free!r} is none of True, False and None. Write one.")
        if self.on_inexact not in ON_INEXACT:
            raise ValueError(f"on_inexact={self.on_inexact!r} is unknown. Write one of {', '.join(ON_INEXACT)}.")
        if self.collate_in not in COLLATE_IN:
            raise ValueError(f"collate_in={self.collate_in!r} is unknown. Write one of {', '.join(COLLATE_IN)}.")
        check_rank_timeout(self.rank_timeout)


def check_rank_timeout(seconds: float) -> None:
    """Raises `ValueError` unless it is 0 or a time in which a process surely has several turns."""
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if not is_number or not (seconds == 0 or 1 <= seconds < float("inf")):
        raise ValueError(
            f"rank_timeout={seconds!r} is no number of seconds from 1 on. Write for example rank_timeout=60, or "
            "rank_timeout=0 to have ranks wait for ddp_timeout when another one fails."
        )
