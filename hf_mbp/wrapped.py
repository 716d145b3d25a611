"""What has to be known of a model that torch, Accelerate or DeepSpeed has sharded, quantized or compiled.

As `compat.py` does, this touches private and version-dependent names; each function says what it relies on.
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType, DynamoBackend
from torch.distributed.fsdp import FSDPModule


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


def num_elements(parameter: torch.Tensor) -> int:
    """Elements of a parameter; ZeRO-3 leaves an empty tensor in its place, and keeps the number beside it."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


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


def attention_of(model: torch.nn.Module) -> str:
    """How the model computes attention, as transformers calls it; it keeps that in `config._attn_implementation`."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None))


def attends_in_segments(model: torch.nn.Module) -> bool:
    """Whether attention takes rows that lie end to end one after the other, and is told by arguments where they begin.

    Flash attention does, by `FlashAttentionKwargs`, which pass through a model as keywords that it does not name.
    """
    return "flash" in attention_of(model) and accepts(model, "cu_seq_lens_q")


def most_positions(model: torch.nn.Module) -> int | None:
    """How many positions the model knows, if its configuration says so: `config.max_position_embeddings`."""
    return _said_in_config(model, "max_position_embeddings")


def attention_chunk(model: torch.nn.Module) -> int | None:
    """The tokens of a chunk that attention does not look out of: `config.attention_chunk_size`."""
    return _said_in_config(model, "attention_chunk_size")


def _said_in_config(model: torch.nn.Module, name: str) -> int | None:
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return getattr(config, name, None)


def checkpoints_activations(model: torch.nn.Module) -> bool:
    """Whether any part of the model runs with activation checkpointing.

    By the attribute of its modules: the property of models has another name from transformers 5.24 on.
    """
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


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


def takes_by_name(model: torch.nn.Module, argument: str) -> bool:
    """Whether the forward pass of the model, also compiled or under PEFT, has an argument of that name itself."""
    return argument in _parameters(model)


def accepts(model: torch.nn.Module, argument: str) -> bool:
    """Whether it may have an argument of that name, if only to hand it on."""
    parameters = _parameters(model)
    return argument in parameters or any(kind.kind == kind.VAR_KEYWORD for kind in parameters.values())


def _parameters(model: torch.nn.Module) -> Mapping[str, inspect.Parameter]:
    base: Any = getattr(model, "_orig_mod", model)
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    return inspect.signature(base.forward).parameters


def sequence_numbers() -> dict[str, int]:
    """How many collectives this rank has made in each process group, by the group's name; empty on one process.

    Every backend numbers them, so that its watchdog can compare the ranks.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return {}
    groups: Any = torch.distributed.distributed_c10d._world.pg_map
    return {group.group_name: group._get_sequence_number_for_group() for group in groups}


def group_of_collective(operator: Any, arguments: tuple[Any, ...]) -> str | None:
    """The name of the process group in which an operator communicates; `None` if it does not.

    Those of `torch.ops.c10d` (torch 2.11 to 2.13) have a `ProcessGroup` among their arguments.
    """
    if operator.namespace != "c10d":
        return None
    boxed: list[Any] = [argument for argument in arguments if isinstance(argument, torch.ScriptObject)]
    groups = [group for group in boxed if group._type().name() == "ProcessGroup"]
    return str(torch.distributed.ProcessGroup.unbox(groups[0]).group_name) if groups else None


def without_communication(operator: Any, arguments: tuple[Any, ...]) -> Any:
    """What a collective returns, its outputs left as they are: its work, or them, the first argument, and its work."""
    from torch._C._distributed_c10d import FakeWork

    done = FakeWork().boxed()
    return done if len(operator._schema.returns) == 1 else (arguments[0], done)


def replicated_in(model: torch.nn.Module) -> torch.nn.parallel.DistributedDataParallel | None:
    """The wrapper by which DDP reduces the gradients of a model; a compiled one keeps it in `_orig_mod`."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, torch.nn.parallel.DistributedDataParallel) else None


def reduce_gradients(replicated: torch.nn.parallel.DistributedDataParallel) -> None:
    """Has DDP average what lies in `.grad` over the ranks: a pass through its wrapper that computes nothing.

    DDP reduces in hooks of a backward pass. Were that the pass of a micro-batch, and there were no memory for it, its
    reducer could not be used again. So all micro-batches run without synchronisation, and this is the last pass. A
    stand-in takes the place of the module, so that no hook of the user's sees it.
    """
    module = replicated.module
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if replicated.find_unused_parameters:  # those that no rank has used have to stay without a gradient
        parameters = [parameter for parameter in parameters if parameter.grad is not None]
    replicated._modules["module"] = _UsesAll(parameters)
    replicated.require_forward_param_sync = False  # the stand-in has no buffers to broadcast
    try:
        replicated(None).backward()  # with nothing at all, it would fail to move its arguments to a GPU
    finally:
        replicated._modules["module"] = module


class _UsesAll(torch.nn.Module):
    """Depends on parameters that it does not own, with a gradient of zero for each."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        super().__init__()
        self.used = parameters  # a list, so that they are not registered

    def forward(self, _: None) -> torch.Tensor:
        nothing: torch.Tensor = _Nothing.apply(*self.used)  # type: ignore[no-untyped-call]
        return nothing


class _Nothing(torch.autograd.Function):
    """Zero, whatever the parameters are; their gradients are zeros that take no memory."""

    @staticmethod
    def forward(ctx: Any, *parameters: torch.Tensor) -> torch.Tensor:
        ctx.parameters = parameters
        return torch.zeros((), device=parameters[0].device)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(parameter.new_zeros(()).expand(parameter.shape) for parameter in ctx.parameters)


def buffer_syncs(modules: list[torch.nn.Module]) -> list[bool]:
    """Whether DDP broadcasts the buffers before the next forward pass, as it does once after each synchronisation."""
    wrappers = [replicated for module in modules if (replicated := replicated_in(module)) is not None]
    return [replicated.require_forward_param_sync for replicated in wrappers]


def set_buffer_syncs(modules: list[torch.nn.Module], syncs: list[bool]) -> None:
    """Makes that what it was when `buffer_syncs` was asked."""
    wrappers = [replicated for module in modules if (replicated := replicated_in(module)) is not None]
    for replicated, sync in zip(wrappers, syncs, strict=True):
        replicated.require_forward_param_sync = sync


def broadcast_buffers(modules: list[torch.nn.Module]) -> None:
    """Makes the broadcast of buffers that is due before a forward pass, as DDP does."""
    for module in modules:
        if (replicated := replicated_in(module)) is not None and replicated.will_sync_module_buffers():  # type: ignore[no-untyped-call]
            replicated._sync_buffers()  # type: ignore[no-untyped-call]


def reset_iteration(modules: list[torch.nn.Module]) -> None:
    """Has FSDP2 forget a pass that was cut short, with the gradients it has gathered (torch 2.12).

    And forward passes that no backward pass followed, after which it gathers some parameters in vain.
    """
    for module in modules:
        if isinstance(module, FSDPModule) and module._get_fsdp_state()._is_root:  # known from its first pass on
            module.reset_iter_state()


def recovers(accelerator: Any) -> bool:
    """Whether a step can be run again after a pass was cut short: not by DeepSpeed, nor FSDP2 before torch 2.12."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return False
    return accelerator.distributed_type != DistributedType.FSDP or hasattr(FSDPModule, "reset_iter_state")


def version(model: torch.nn.Module) -> int:
    """A number that is another one after every change of its weights, in place or by others.

    Autograd counts changes in place, but not those of tensors made in inference mode.
    """
    return hash(tuple((id(p), 0 if p.is_inference() else p._version) for p in model.parameters()))
