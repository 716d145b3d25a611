"""Micro-batch processing for the Hugging Face ecosystem: any batch size fits, exactly, with little padding."""

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
    "plan_micro_batches",
    "run_mini_batch",
]
