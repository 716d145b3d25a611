"""The only place that touches private or version-dependent names of transformers and Accelerate.

Checked against transformers 5.17 and 5.23, accelerate 1.15. Each function says what it relies on.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend, send_to_device
from transformers import Trainer
from transformers.trainer_utils import has_length

from hf_mbp import other_trainers

ABSENT = object()


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Sets attributes of an object for a while; an instance attribute that was not there is taken away again."""
    before = {name: vars(owner).get(name, ABSENT) for name in values}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


@contextmanager
def deferred_collation(trainer: Any, collator: Any) -> Iterator[None]:
    """Lets `get_train_dataloader` build its loader with another collator.

    `Trainer._get_dataloader` reads `data_collator` and wraps it to remove unused columns. For iterable data sets
    Accelerate would build a dispatcher, which concatenates tensors; one process does not need it.
    """
    config = trainer.accelerator.dataloader_config
    dispatches = config.dispatch_batches
    if trainer.accelerator.num_processes == 1:
        dispatches = False
    elif dispatches or (dispatches is None and isinstance(trainer.train_dataset, torch.utils.data.IterableDataset)):
        raise ValueError(
            "Iterable training data is dispatched from the first process, which needs rows padded to equal lengths. "
            "Let every process read its own share: accelerator_config={'dispatch_batches': False}."
        )
    with replaced(trainer, data_collator=collator), replaced(config, dispatch_batches=dispatches):
        yield


@contextmanager
def weighted_loss(trainer: Any, weight: float, num_items: float, *, varies: bool = False) -> Iterator[None]:
    """Makes the stock `training_step` back-propagate `weight` times the mean loss of its micro-batch.

    It calls `self.compute_loss`, whoever overrides it, then may divide by `current_gradient_accumulation_steps`; which
    losses it divides differs between versions and between models, so the weight goes to the loss itself and the
    divisor is 1. `average_tokens_across_devices` would multiply by the number of processes. `varies` marks the inputs
    for a compiled model: only here are they on the device already.
    """
    compute_loss, count = trainer.compute_loss, items_argument(trainer, num_items)

    def weighted(*args: Any, **kwargs: Any) -> Any:
        if varies:
            mark_varying(kwargs["inputs"] if "inputs" in kwargs else args[1])
        result = compute_loss(*args, **{**kwargs, "num_items_in_batch": count})
        return (result[0] * weight, *result[1:]) if isinstance(result, tuple) else result * weight

    with (
        replaced(trainer, compute_loss=weighted, current_gradient_accumulation_steps=1),
        replaced(trainer.args, average_tokens_across_devices=False),
    ):
        yield


@contextmanager
def local_gathers(trainer: Any) -> Iterator[None]:
    """Makes `accelerator.gather` and `gather_for_metrics` return what this rank has.

    For calls of the user's loss that not all ranks make, and for metrics that are put together later.
    """

    def local(tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor[None] if isinstance(tensor, torch.Tensor) and tensor.ndim == 0 else tensor

    with replaced(trainer.accelerator, gather=local, gather_for_metrics=local):
        yield


def items_argument(trainer: Any, num_items: float) -> torch.Tensor | None:
    """What `compute_loss` gets as `num_items_in_batch`.

    `None`, so that every head returns its own mean; the micro-batch's own count, which gives the same mean, if the
    user's code may want to divide by it; 1 for a micro-batch of weight zero, which has none.
    """
    is_overridden = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
    if trainer.compute_loss_func is None and not is_overridden:
        return None
    return torch.tensor(num_items or 1, device=trainer.args.device)


def prepare_inputs(trainer: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the device, by `Trainer._prepare_inputs`."""
    prepared: dict[str, Any] = trainer._prepare_inputs(dict(inputs))
    return prepared


def sync_deferral(trainer: Any, model: torch.nn.Module) -> Callable[[], AbstractContextManager[Any]]:
    """`local_gradients` for a trainer's model; models sharded at load time have a `no_sync` of their own (5.23)."""
    own = getattr(trainer, "_defer_fsdp_gradient_reduction", None)
    is_sharded_at_load = getattr(trainer, "is_distributed_loading_by_transformers", False)
    return partial(local_gradients, trainer.accelerator, model, own if is_sharded_at_load else None)


@contextmanager
def local_gradients(accelerator: Any, model: torch.nn.Module, no_sync: Any = None) -> Iterator[None]:
    """A context in which gradients stay on this rank, for all micro-batches of a step but the last.

    Besides `no_sync` the flag of Accelerate has to be cleared: stock reduces replicated parameters, and DeepSpeed's
    wrapper steps the engine, whenever it is set.
    """
    state = accelerator.gradient_state
    syncs = state.sync_gradients
    state._set_sync_gradients(False)
    try:
        with no_sync() if no_sync else accelerator.no_sync(model):
            yield
    finally:
        state._set_sync_gradients(syncs)


@contextmanager
def without_buffer_sync(model: torch.nn.Module) -> Iterator[None]:
    """Keeps DDP from broadcasting buffers in a forward pass that not all ranks make."""
    if not hasattr(model, "require_forward_param_sync"):
        yield
        return
    with replaced(model, require_forward_param_sync=False):
        yield


def to_device(accelerator: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the device of this rank."""
    moved: dict[str, Any] = send_to_device(inputs, accelerator.device)
    return moved


def void_step(accelerator: Any, model: torch.nn.Module) -> None:
    """Lets the gradient scaler of fp16 skip an optimizer step that has no gradients.

    `GradScaler.step` insists on gradients to look at. One that is infinite it takes for an overflow: it leaves the
    weights and backs off its scale. So the scale is raised by as much before, and is what it was after the step; only
    the count of steps until it grows starts again.
    """
    scaler = accelerator.scaler
    if scaler is not None and scaler.is_enabled():
        scaler.scale(torch.zeros((), device=accelerator.device))  # its scale is made at the first call
        scaler.update(new_scale=scaler.get_scale() / scaler.get_backoff_factor())
        parameter = next(parameter for parameter in model.parameters() if parameter.requires_grad)
        parameter.grad = torch.full_like(parameter, float("inf"))


def compiles(accelerator: Any, model: torch.nn.Module) -> bool:
    """Whether torch.compile runs the model or a part of it, by the user or by Accelerate (`torch_compile=True`).

    `torch.compile(module)` keeps the module in `_orig_mod`; `module.compile()` sets `_compiled_call_impl`.
    """
    return accelerator.state.dynamo_plugin.backend != DynamoBackend.NO or any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def eagerly(compiles: bool) -> AbstractContextManager[Any]:
    """A context in which a compiled model runs as if it were not."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager") if compiles else nullcontext()
    return stance


def mark_varying(inputs: Any) -> None:
    """Tells the compiler that rows and width differ from call to call: one compilation takes all shapes but one row.

    Without it the first shape is compiled alone, and under `dynamic=False` every one, until dynamo gives up. A hint:
    unlike `mark_dynamic` it allows a model to rely on a size. Widths are those of tokens, masks and labels; the second
    dimension of images and sounds is fixed.
    """
    from torch._dynamo import maybe_mark_dynamic  # which takes seconds to import, and has no public place yet

    for value in inputs.values():
        if isinstance(value, torch.Tensor):
            for dimension in range(min(value.ndim, 1 if value.is_floating_point() else 2)):
                maybe_mark_dynamic(value, dimension)


def is_sharded(trainer: Any) -> bool:
    """Whether a forward pass of the model is a collective, so that it cannot be tried on one rank alone."""
    return bool(
        trainer.is_fsdp_enabled
        or trainer.is_deepspeed_enabled
        or getattr(trainer, "is_distributed_loading_by_transformers", False)
    )


def shards(accelerator: Any) -> bool:
    """Whether Accelerate runs FSDP or DeepSpeed."""
    return accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)


def refuse_float32_sums(*, is_sharded: bool) -> None:
    """Raises `ValueError` if gradients are sharded: what a backward pass leaves in `.grad` is then not all there is."""
    if is_sharded:
        raise ValueError(
            "accumulate_in_fp32=True is for weights in half precision that are whole on each rank; FSDP and DeepSpeed "
            "keep their gradients elsewhere, and have options of their own. Leave it out. Under FSDP load the model "
            "with dtype='float32' and give the FSDP plugin a mixed_precision_policy with reduce_dtype=torch.float32; "
            "under DeepSpeed write 'data_types': {'grad_accum_dtype': 'fp32'} into its configuration."
        )


def refuse_unsupported(trainer: Any) -> None:
    """Raises `ValueError` for what is not supported, with the reason and the remedy."""
    if trainer.mbp_config.accumulate_in_fp32:
        refuse_float32_sums(is_sharded=is_sharded(trainer))
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
        "TPU/XLA": (
            trainer.accelerator.distributed_type == DistributedType.XLA,
            "micro-batches of changing shapes would be compiled anew each time. Use a GPU or a CPU.",
        ),
    }
    present = [(what, why) for what, (is_present, why) in refusals.items() if is_present]
    for what, why in (*present, *other_trainers.refusals(trainer)):
        raise ValueError(f"Micro-batching does not support {what}: {why}")


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether the forward pass of the model, also compiled or under PEFT, may have an argument of that name."""
    base: Any = getattr(model, "_orig_mod", model)
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    parameters = inspect.signature(base.forward).parameters
    return argument in parameters or any(kind.kind == kind.VAR_KEYWORD for kind in parameters.values())


def warn_of_smaller_batch(before: int | None, batch_size: int | None) -> None:
    """Warns if `auto_find_batch_size` starts again with a smaller mini-batch than `before`."""
    if before is not None and batch_size is not None and batch_size < before:
        warnings.warn(
            f"Out of memory: auto_find_batch_size starts again with {batch_size} rows instead of {before}, which "
            "changes the optimisation. Turn it off, and set memory_limit or max_tokens_per_micro_batch lower instead.",
            stacklevel=3,
        )


def require_rows(trainer: Any) -> None:
    """Raises `ValueError` if the training data is empty."""
    dataset = trainer.train_dataset
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty: there is nothing to train on. Check the file and its filters.")
