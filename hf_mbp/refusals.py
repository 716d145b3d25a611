"""What is refused, or warned of, before training: each with the reason and the remedy."""

import warnings
from typing import Any

from accelerate.utils import DistributedType
from transformers.trainer_utils import has_length

from hf_mbp import other_trainers
from hf_mbp.compat import has_own_loss
from hf_mbp.wrapped import is_sharded


def refuse_unsupported(trainer: Any) -> None:
    """Raises `ValueError` for what is not supported, with the reason and the remedy."""
    if trainer.mbp_config.accumulate_in_fp32:
        refuse_float32_sums(is_sharded=is_sharded(trainer))
    if trainer.mbp_config.memory_limit is not None and is_sharded(trainer):
        raise ValueError(
            f"memory_limit={trainer.mbp_config.memory_limit!r}: the budget cannot be sized from memory under FSDP and "
            "DeepSpeed yet. Leave memory_limit out, and set max_tokens_per_micro_batch."
        )
    args, parallelism = trainer.args, getattr(trainer.accelerator, "parallelism_config", None)
    optimizer = str(getattr(args.optim, "value", args.optim))
    refusals = {
        f"{args.n_gpu} GPUs in one process": (
            args.n_gpu > 1,
            "torch.nn.DataParallel would split every micro-batch again. Start with `accelerate launch` or `torchrun`, "
            "or show one GPU with CUDA_VISIBLE_DEVICES=0.",
        ),
        "context, sequence or tensor parallelism": (
            parallelism is not None and max(parallelism.cp_size, parallelism.sp_size, parallelism.tp_size) > 1,
            "ranks that share a batch would have to share its plan. Use data parallelism (DDP).",
        ),
        f"optim={optimizer!r}": (
            "lomo" in optimizer or "layerwise" in optimizer,
            "it updates the weights during the backward pass, before the gradient of the mini-batch is complete. "
            "Choose another optim, such as 'adamw_torch'.",
        ),
        "ddp_static_graph=True": (
            bool(getattr(args, "ddp_static_graph", None)),
            "DDP would have to see the first micro-batch synchronise its gradients. Leave it out.",
        ),
        "FSDP 1": (
            trainer.is_fsdp_enabled and trainer.accelerator.state.fsdp_plugin.fsdp_version == 1,
            "it is not tested, as it needs a GPU to start. Use FSDP2: fsdp_config={'version': 2}, or fsdp_version: 2 "
            "in the configuration of Accelerate.",
        ),
        "TPU/XLA": (
            trainer.accelerator.distributed_type == DistributedType.XLA,
            "micro-batches of changing shapes would be compiled anew each time. Use a GPU or a CPU.",
        ),
    }
    present = [(what, why) for what, (is_present, why) in refusals.items() if is_present]
    for what, why in (*present, *other_trainers.refusals(trainer)):
        raise ValueError(f"Micro-batching does not support {what}: {why}")


def embeds_rows(trainer: Any) -> bool:
    """Whether a trainer has a loss that compares all rows of a mini-batch, to be run in two passes.

    Raises:
        TypeError: it says only half of what has to be known, or computes its loss otherwise, too.
        ValueError: the model is sharded.
    """
    names = [name for name in ("embed_rows", "loss_of_embeddings") if callable(getattr(trainer, name, None))]
    if not names:
        return False
    if len(names) == 1:
        missing = "loss_of_embeddings" if names[0] == "embed_rows" else "embed_rows"
        raise TypeError(f"{type(trainer).__name__} has {names[0]}, but no {missing}: define both.")
    if has_own_loss(trainer):
        raise TypeError(
            f"{type(trainer).__name__} has embed_rows and loss_of_embeddings, and a compute_loss or compute_loss_func "
            "beside them: leave out one or the other."
        )
    if is_sharded(trainer):
        raise ValueError(
            "embed_rows and loss_of_embeddings: two passes are not tested under FSDP and DeepSpeed. Use plain DDP."
        )
    return True


def refuse_float32_sums(*, is_sharded: bool) -> None:
    """Raises `ValueError` if gradients are sharded: what a backward pass leaves in `.grad` is then not all there is."""
    if is_sharded:
        raise ValueError(
            "accumulate_in_fp32=True is for weights in half precision that are whole on each rank; FSDP and DeepSpeed "
            "keep their gradients elsewhere, and have options of their own. Leave it out. Under FSDP load the model "
            "with dtype='float32' and give the FSDP plugin a mixed_precision_policy with reduce_dtype=torch.float32; "
            "under DeepSpeed write 'data_types': {'grad_accum_dtype': 'fp32'} into its configuration."
        )


def require_rows(trainer: Any) -> None:
    """Raises `ValueError` if the training data is empty."""
    dataset = trainer.train_dataset
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty: there is nothing to train on. Check the file and its filters.")


def require_batches(trainer: Any, loader: Any) -> None:
    """Raises `ValueError` if `dataloader_drop_last` leaves no batch of the training data."""
    args = trainer.args
    if not (args.dataloader_drop_last and has_length(loader)) or len(loader) > 0:
        return
    count = trainer.accelerator.num_processes
    ranks = f" on each of {count} processes" if count > 1 else ""
    raise ValueError(
        f"train_dataset has {len(trainer.train_dataset):,} rows, which is not one batch of {args.train_batch_size}"
        f"{ranks}, and dataloader_drop_last drops what is less: there is nothing to train on. Set "
        "dataloader_drop_last=False, or a smaller per_device_train_batch_size."
    )


def warn_of_smaller_batch(before: int | None, batch_size: int | None) -> None:
    """Warns if `auto_find_batch_size` starts again with a smaller mini-batch than `before`."""
    if before is not None and batch_size is not None and batch_size < before:
        warnings.warn(
            f"Out of memory: auto_find_batch_size starts again with {batch_size} rows instead of {before}, which "
            "changes the optimisation. Turn it off, and set memory_limit or max_tokens_per_micro_batch lower instead.",
            stacklevel=3,
        )
