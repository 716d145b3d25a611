"""The only place, with `wrapped.py`, that touches private or version-dependent names of transformers and Accelerate.

Checked against transformers 5.17 and 5.24, accelerate 1.15. Each function says what it relies on.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length

from hf_mbp import wrapped
from hf_mbp.loss_value import scalar_of

ABSENT = object()

_LOSS_REMEDY = "Take the mean over the rows or tokens in it, without .item(), .detach() and torch.no_grad()."


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
            wrapped.mark_varying(kwargs["inputs"] if "inputs" in kwargs else args[1])
        result = compute_loss(*args, **{**kwargs, "num_items_in_batch": count})
        loss, *rest = result if isinstance(result, tuple) else (result,)
        if torch.is_grad_enabled():
            loss = scalar_of(loss, function=f"{type(trainer).__name__}.compute_loss", remedy=_LOSS_REMEDY)
        return (loss * weight, *rest) if isinstance(result, tuple) else loss * weight

    with (
        replaced(trainer, compute_loss=weighted, current_gradient_accumulation_steps=1),
        replaced(trainer.args, average_tokens_across_devices=False),
    ):
        yield


@contextmanager
def mean_loss(trainer: Any, num_items: float, *, varies: bool = False) -> Iterator[list[bool]]:
    """Makes the stock `prediction_step` return the mean loss of its micro-batch, which has so many items.

    It counts the items with `_get_num_items_in_batch` (5.24), a collective, and passes the count to `compute_loss`.
    Yields a list that is empty unless it was asked to count: the prediction steps of TRL, and those that generate, do
    not.
    """
    asked: list[bool] = []

    def not_counted(*_: Any, **__: Any) -> None:
        asked.append(True)

    with weighted_loss(trainer, 1.0, num_items, varies=varies), replaced(trainer, _get_num_items_in_batch=not_counted):
        yield asked


@contextmanager
def counted_loss(trainer: Any, count: int) -> Iterator[None]:
    """Makes the stock `prediction_step` take a number for the count of items."""
    counted = torch.tensor(count, device=trainer.args.device)
    with replaced(trainer, _get_num_items_in_batch=lambda *_, **__: counted):
        yield


def stock_count(trainer: Any, inputs: dict[str, Any]) -> float | None:
    """The items of an evaluation batch as stock counts them, on all ranks together as a rule: then a collective."""
    count = trainer._get_num_items_in_batch([inputs], trainer.args.device)
    return None if count is None else float(count)


def num_beams(trainer: Any) -> int:
    """Beams of the generation that `Seq2SeqTrainer` was asked for, which it keeps in `_gen_kwargs`."""
    asked = getattr(trainer, "_gen_kwargs", {}).get("num_beams")
    return int(asked or getattr(trainer.model.generation_config, "num_beams", None) or 1)


def same_generation(trainer: Any, run: Callable[[Any], Any], *, leaves_it: bool = False) -> Callable[[Any], Any]:
    """A prediction step that finds `model.generation_config` as it is now in every call, and after it if `leaves_it`.

    `Seq2SeqTrainer.prediction_step` writes defaults into it after its first call: from there on a `max_length` of 20,
    which the first call reads as 20 new tokens, counts the first one, too (5.24).
    """
    config = getattr(trainer.model, "generation_config", None)
    if config is None:
        return run
    before = copy.deepcopy(vars(config))

    def put_back() -> None:
        vars(config).clear()
        vars(config).update(copy.deepcopy(before))

    def run_again(inputs: Any) -> Any:
        put_back()
        try:
            return run(inputs)
        finally:
            if leaves_it:
                put_back()

    return run_again


def pad_token_of_generation(trainer: Any) -> int:
    """What `generate` writes behind rows that have come to their end before others."""
    config = trainer.model.generation_config
    candidates = (config.pad_token_id, config.eos_token_id, getattr(trainer.model.config, "pad_token_id", None))
    token = next((token for token in candidates if token is not None), 0)
    return int(token[0] if isinstance(token, (list, tuple)) else token)


@contextmanager
def local_gathers(trainer: Any) -> Iterator[None]:
    """Makes `accelerator.gather` and `gather_for_metrics` return what this rank has.

    For calls of the user's loss that not all ranks make, and for metrics that are put together later.
    """

    def local(tensor: Any, *_: Any, **__: Any) -> Any:
        return tensor[None] if isinstance(tensor, torch.Tensor) and tensor.ndim == 0 else tensor

    with replaced(trainer.accelerator, gather=local, gather_for_metrics=local):
        yield


class TokenizedRows:
    """Before a trainer of TRL that would tokenise its rows in any case: `DPOTrainer` does, those of `SFTTrainer` only
    if they have no `input_ids` (1.16)."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


@contextmanager
def unwrapped_in_losses(trainer: Any, modules: list[torch.nn.Module]) -> Iterator[None]:
    """Puts the model itself in the place of its DDP wrapper, where a loss holds on to that.

    Trainers of sentence-transformers do so from their first step on (`override_model_in_loss`). What is run on the side
    must not pass the wrapper: not all ranks may run it, and its reducer would take note.
    """
    held = [
        (module, name)
        for outer in modules
        if outer is not trainer.model
        for module in outer.modules()
        for name, child in module._modules.items()
        if child is trainer.model_wrapped and child is not trainer.model
    ]
    for module, name in held:
        module._modules[name] = trainer.model
    try:
        yield
    finally:
        for module, name in held:
            module._modules[name] = trainer.model_wrapped


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
    if not has_own_loss(trainer):
        return None
    return torch.full((), num_items or 1, device=trainer.args.device)  # a copy would wait for the device


def has_own_loss(trainer: Any) -> bool:
    """Whether the loss is computed by code of the user or of another trainer, not by the model alone."""
    is_overridden = type(trainer).compute_loss is not Trainer.compute_loss or "compute_loss" in vars(trainer)
    return is_overridden or trainer.compute_loss_func is not None


def to_training_mode(trainer: Any, model: torch.nn.Module) -> None:
    """As `Trainer.training_step` begins: schedule-free optimizers have other weights for evaluation."""
    model.train()
    if callable(getattr(trainer.optimizer, "train", None)):
        trainer.optimizer.train()


def loss_scale(accelerator: Any) -> float:
    """What the scaler of fp16 multiplies losses by before they are back-propagated."""
    return float(accelerator.scaler.get_scale()) if getattr(accelerator, "scaler", None) is not None else 1.0


def operations_of(model: Any, count: Callable[[dict[str, Any]], int], micro_batches: list[dict[str, Any]]) -> int:
    """Floating-point operations of micro-batches, where `count` is the `floating_point_ops` of a trainer.

    That of stock multiplies the elements of the main input by the parameters, which it counts at every call (5.24): so
    it is called once, with one input of as many elements, and no data. Before, models were asked, and may be.
    """
    name = getattr(model, "main_input_name", "input_ids")
    is_stock = getattr(count, "__func__", None) is Trainer.floating_point_ops and not hasattr(
        model, "floating_point_ops"
    )
    if is_stock and all(isinstance(inputs.get(name), torch.Tensor) for inputs in micro_batches):
        elements = sum(inputs[name].numel() for inputs in micro_batches)
        micro_batches = [{name: torch.empty(elements, device="meta")}]
    return sum(int(count(inputs)) for inputs in micro_batches)


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
    DeepSpeed does so from ZeRO-2 on anyway; under DDP there is no memory to save.
    """
    state = accelerator.gradient_state
    if state.plugin_kwargs.get("sync_each_batch") and accelerator.distributed_type == DistributedType.FSDP:
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


def forget_evaluation(trainer: Any) -> None:
    """Lets training prepare a model that was evaluated before it.

    `Trainer.evaluate` prepares the bare model (`prepare_model(evaluation_mode=True)`), which marks it as prepared, and
    `prepare` then returns it as it is, without `DistributedDataParallel`: every rank would train by itself, on its own
    rows (accelerate 1.15). Under DeepSpeed it makes an engine without an optimizer, and training would keep that.
    """
    accelerator, model = trainer.accelerator, trainer.model
    if accelerator.distributed_type.value == "DEEPSPEED":
        trainer.model_wrapped, trainer.deepspeed = model, None
        return
    is_replicated = accelerator.distributed_type.value.startswith("MULTI_")
    is_wrapped = isinstance(trainer.model_wrapped, torch.nn.parallel.DistributedDataParallel)
    if is_replicated and not is_wrapped and vars(model).pop("_is_accelerate_prepared", False):
        trainer.model_wrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        accelerator._models.clear()


def replace_next_call(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Has the next call of a method made by `function(method, ...)`; those after it are made as before.

    On the instance, where Accelerate's and the schedulers' own wrappers of `optimizer.step` lie, too.
    """
    method, before = getattr(owner, name), vars(owner).get(name, ABSENT)

    def once(*args: Any, **kwargs: Any) -> Any:
        if before is ABSENT:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
        return function(method, *args, **kwargs)

    setattr(owner, name, once)


def can_checkpoint(model: Any) -> bool:
    """Whether activation checkpointing can be turned on for a model of transformers, and is not on already."""
    return bool(getattr(model, "supports_gradient_checkpointing", False)) and not wrapped.checkpoints_activations(model)


@contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Activation checkpointing for a while. Non-reentrant: with random numbers, gradients and hooks as without.

    The methods were called `gradient_checkpointing_*` before transformers 5.24. To enable it also registers hooks by
    which embeddings, frozen or not, pass on gradients: models whose own code checkpoints reentrantly need them. To
    disable it leaves them there, one more each time, and frozen layers would be differentiated from then on.
    """
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable, disable = (getattr(model, f"{name}_checkpointing_{what}") for what in ("enable", "disable"))
    owner = vars(getattr(enable, "__self__", model))  # under PEFT a model inside of `model`
    handles = {key: owner[key] for key in INPUT_GRADIENT_HOOKS if key in owner}
    before = {module: set(module._forward_hooks) for module in model.modules()}
    enable(**{f"{name}_checkpointing_kwargs": {"use_reentrant": False}})
    added = [(module, key) for module, keys in before.items() for key in module._forward_hooks.keys() - keys]
    try:
        yield
    finally:
        disable()
        for module, hook in added:
            module._forward_hooks.pop(hook, None)
        for key in INPUT_GRADIENT_HOOKS:
            owner.pop(key, None)
        owner.update(handles)


INPUT_GRADIENT_HOOKS = ("_require_grads_hooks", "_require_grads_hook")
"""Where `enable_input_require_grads` keeps the handles of its hooks, which users may call, too."""


def prepared_modules(accelerator: Any, modules: list[torch.nn.Module]) -> list[torch.nn.Module]:
    """The modules, and all others that Accelerate has prepared (`_models`, 1.15), such as a head beside the model."""
    return list(dict.fromkeys([*modules, *accelerator._models]))


def prepared_parameters(accelerator: Any, modules: list[torch.nn.Module]) -> list[torch.nn.Parameter]:
    """Those of modules, and of all optimizers that Accelerate has prepared."""
    held = [parameter for module in modules for parameter in module.parameters()]
    groups = [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]
    return list(dict.fromkeys([*held, *(parameter for group in groups for parameter in group["params"])]))


def save_checkpoint(trainer: Any) -> str | None:
    """Saves a checkpoint of the last complete step, where saving is on; to be called by all ranks. Says where it is."""
    if trainer.args.save_strategy == "no" or not trainer.state.global_step:
        return None
    trainer._save_checkpoint(trainer.model, trial=None)
    return str(checkpoint_folder(trainer, trial=None))


def checkpoint_folder(trainer: Any, trial: Any) -> Path:
    """Where `_save_checkpoint` writes now; `trial` is one of a hyperparameter search."""
    return Path(trainer._get_output_dir(trial), f"{PREFIX_CHECKPOINT_DIR}-{trainer.state.global_step}")
