"""The only place that touches private or version-dependent names of transformers and Accelerate.

Checked against transformers 5.17 and 5.23, accelerate 1.15. Each function says what it relies on.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend, send_to_device
from torch.distributed.fsdp import FSDPModule
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


@contextmanager
def without_autocast(accelerator: Any, modules: list[torch.nn.Module]) -> Iterator[None]:
    """Takes mixed precision off models and off `accelerator.autocast()`.

    `Accelerator.prepare_model` puts another `forward` on the model, and keeps the one before as `_original_forward`
    (1.15); `Accelerator.autocast` asks `native_amp`.
    """
    wrapped = [module for module in modules if "_original_forward" in vars(module)]
    with ExitStack() as stack:
        for module in dict.fromkeys(wrapped):
            stack.enter_context(replaced(module, forward=vars(module)["_original_forward"]))
        stack.enter_context(replaced(accelerator, native_amp=False))
        yield


@contextmanager
def unrounded_float32() -> Iterator[None]:
    """Has float32 products computed in float32, and not in the shorter TF32 or bfloat16.

    By the names of torch 2.9, which the older ones may contradict: `torch.backends.cudnn.flags` reads its own older
    flag, and refuses a mixture. So that one is set, too, and again before the new ones are put back.
    """
    backends: Any = torch.backends
    owners = [
        *(backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn),
        *(backends.mkldnn.matmul, backends.mkldnn.conv, backends.mkldnn.rnn),
    ]
    before = [(owner, owner.fp32_precision) for owner in owners if hasattr(owner, "fp32_precision")]
    allowed_tf32 = "tf32" in (backends.cudnn.conv.fp32_precision, backends.cudnn.rnn.fp32_precision)
    backends.cudnn.allow_tf32 = False
    for owner, _ in before:
        owner.fp32_precision = "ieee"
    try:
        yield
    finally:
        backends.cudnn.allow_tf32 = allowed_tf32
        for owner, precision in before:
            owner.fp32_precision = precision


def needs_half_precision(modules: list[torch.nn.Module]) -> str | None:
    """What in the models runs in half precision only, or has no weights that could be copied; `None` if nothing.

    Flash attention is known by `config._attn_implementation`, quantized weights by their integers or 8-bit floats.
    """
    every = [module for held in modules for module in held.modules()]
    names = {str(getattr(getattr(module, "config", None), "_attn_implementation", None)) for module in every}
    if any("flash" in name for name in names):
        return "flash attention takes nothing else"
    weights = [weight for module in every for weight in module.parameters(recurse=False)]
    if any(weight.is_quantized or weight.element_size() == 1 for weight in weights):
        return "the weights are quantized"
    return None


def holds_shards(modules: list[torch.nn.Module]) -> bool:
    """Whether parameters stand for parts of themselves: those of FSDP and of ZeRO-3 may not be put aside.

    FSDP 1 marks its modules for the compiler, ZeRO-3 its parameters; those of FSDP 2 are `DTensor`s.
    """
    every = [module for held in modules for module in held.modules()]
    weights = [weight for module in every for weight in module.parameters(recurse=False)]
    return any(hasattr(module, "_is_fsdp_managed_module") for module in every) or any(
        hasattr(weight, "ds_id") or hasattr(weight, "device_mesh") for weight in weights
    )


def reshard(modules: list[torch.nn.Module]) -> None:
    """Puts aside the whole parameters that FSDP2 keeps after a forward pass, in the hope of a backward pass."""
    for module in modules:
        if isinstance(module, FSDPModule):
            module.reshard()


@contextmanager
def kept_loaders(accelerator: Any) -> Iterator[None]:
    """Forgets the data loaders that were prepared meanwhile: `Accelerator` lists all, and saves their states."""
    before = list(accelerator._dataloaders)
    try:
        yield
    finally:
        accelerator._dataloaders[:] = before


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
    wrapper steps the engine, whenever it is set. Whoever asks for `sync_each_batch` wants gradients reduced, and
    sharded, after each micro-batch: more communication, but no unsharded gradients in memory; the sum is the same.
    DeepSpeed does so from ZeRO-2 on anyway.
    """
    state = accelerator.gradient_state
    if state.plugin_kwargs.get("sync_each_batch") and accelerator.distributed_type != DistributedType.DEEPSPEED:
        yield
        return
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


def reads_a_stream(trainer: Any) -> bool:
    """Whether it is only known at its end how many batches the training loader has."""
    return not has_length(trainer.callback_handler.train_dataloader)


def num_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter; ZeRO-3 leaves an empty tensor in its place, and keeps the number beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


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


def is_fsdp2(trainer: Any) -> bool:
    """Whether the model is sharded by FSDP2, under which every rank has its part of every gradient at hand."""
    return bool(trainer.is_fsdp_enabled) and isinstance(trainer.model, FSDPModule)


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


def own_store(name: str) -> Any:
    """A connection of its own to the store that the ranks met at, with keys under a name; `None` where there is none.

    Over the connection of the process group it would wait whenever the main thread waits for a key. MPI has no store.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_backend() == "mpi":
        return None
    c10d: Any = torch.distributed.distributed_c10d
    return c10d.PrefixStore(name, c10d._get_default_store().clone())


def is_lost_connection(error: BaseException) -> bool:
    """Whether an exception is what a rank sees when another one is gone, and no failure of its own.

    NCCL and the store raise a `DistError`; gloo a `RuntimeError` that begins with a place in its sources.
    """
    return isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "/gloo/" in str(error)
    )


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


def forget_evaluation(trainer: Any) -> None:
    """Lets training wrap a model that was evaluated before it in `DistributedDataParallel`.

    `Trainer.evaluate` prepares the bare model (`prepare_model(evaluation_mode=True)`), which marks it as prepared, and
    `prepare` then returns it as it is: every rank would train by itself, on its own rows (accelerate 1.15).
    """
    accelerator, model = trainer.accelerator, trainer.model
    is_replicated = accelerator.distributed_type.value.startswith("MULTI_")
    is_wrapped = isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    if is_replicated and not is_wrapped and vars(model).pop("_is_accelerate_prepared", False):
        trainer.model_wrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator._models.clear()


def require_rows(trainer: Any) -> None:
    """Raises `ValueError` if the training data is empty."""
    dataset = trainer.train_dataset
    if dataset is not None and has_length(dataset) and len(dataset) == 0:
        raise ValueError("train_dataset is empty: there is nothing to train on. Check the file and its filters.")
