"""Micro-batch processing for the Hugging Face ecosystem: any batch size fits, exactly, with little padding."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hf_mbp.checkpoints import last_checkpoint
    from hf_mbp.config import MBPConfig
    from hf_mbp.equivalence import EquivalenceReport, InexactError, check_equivalence
    from hf_mbp.estimate import MemoryEstimate, estimate_max_tokens, estimate_memory
    from hf_mbp.loop import MiniBatchReport, run_mini_batch
    from hf_mbp.plan import plan_micro_batches
    from hf_mbp.trainer import MBPMixin, MBPSeq2SeqTrainer, MBPTrainer
    from hf_mbp.two_passes import EmbedsRows

__version__ = "0.1.0"

__all__ = [
    "EmbedsRows",
    "EquivalenceReport",
    "InexactError",
    "MBPConfig",
    "MBPMixin",
    "MBPSeq2SeqTrainer",
    "MBPTrainer",
    "MemoryEstimate",
    "MiniBatchReport",
    "check_equivalence",
    "estimate_max_tokens",
    "estimate_memory",
    "last_checkpoint",
    "plan_micro_batches",
    "run_mini_batch",
]

_HOMES = {
    "checkpoints": ("last_checkpoint",),
    "config": ("MBPConfig",),
    "equivalence": ("EquivalenceReport", "InexactError", "check_equivalence"),
    "estimate": ("MemoryEstimate", "estimate_max_tokens", "estimate_memory"),
    "loop": ("MiniBatchReport", "run_mini_batch"),
    "plan": ("plan_micro_batches",),
    "trainer": ("MBPMixin", "MBPSeq2SeqTrainer", "MBPTrainer"),
    "two_passes": ("EmbedsRows",),
}
"""Which module has which name. They are imported when they are first asked for: the console command has to say what it
can do before the seconds that torch and transformers take, and planning alone needs neither."""


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f"{__name__}.{module}"), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
