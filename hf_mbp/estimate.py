"""Predicts the memory that training a model takes, without running it and without the device.

Forward pass, backward pass and optimizer step run on fake tensors, which have storages but no memory, and these are
counted. So the peak is that of the operators which really run, and not of a formula. What fake tensors cannot show
(flash attention, 8-bit optimizers, FSDP) is added by formula, and the estimate says so.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from torch import nn

from hf_mbp.byte_sizes import format_bytes, parse_memory_limit
from hf_mbp.collate import has_targets
from hf_mbp.fake import CudaKernels, backward, fake_like, fake_tensors, fake_twin
from hf_mbp.memory import DEFAULT_FRACTION, AllocationTracker

Inputs = Mapping[str, torch.Tensor]

CUBLAS_WORKSPACE_BYTES = 32 * 2**20
"""What torch lets cuBLAS keep on a Hopper GPU, the most of all kinds; 8 MiB on older ones."""

BNB_BLOCK, BNB_SMALLEST = 256, 4096
"""Values that share a float32 scale in an 8-bit state of bitsandbytes, and those from which on a state has 8 bits."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Bytes that training takes on one device, and what for; prints as a table.

    Attributes:
        parameter_bytes: weights and buffers.
        gradient_bytes: one for each trainable weight, which live from the first micro-batch of a step to its end.
        optimizer_bytes: states of the optimizer.
        activation_bytes: the most that a micro-batch adds to these in its forward and backward pass, inputs included.
        step_bytes: the most that the optimizer's step adds to them.
        fixed_bytes: what libraries keep on the device.
        by_formula: what was not counted on fake tensors, but computed, and how.
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    step_bytes: int
    fixed_bytes: int = 0
    by_formula: tuple[str, ...] = ()

    @property
    def resident_bytes(self) -> int:
        """What is there between two micro-batches, whatever their size."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes + self.fixed_bytes

    @property
    def peak_bytes(self) -> int:
        """The most at any time of a step: activations are gone when the optimizer runs."""
        return self.resident_bytes + max(self.activation_bytes, self.step_bytes)

    def __str__(self) -> str:
        parts = {
            "parameters": self.parameter_bytes,
            "gradients": self.gradient_bytes,
            "optimizer states": self.optimizer_bytes,
            "libraries": self.fixed_bytes,
            "activations": self.activation_bytes,
            "or in the optimizer's step": self.step_bytes,
            "peak": self.peak_bytes,
        }
        lines = [f"{name:<28}{format_bytes(size):>12}" for name, size in parts.items()]
        formulas = [f"by formula: {formula}" for formula in self.by_formula]
        return "\n".join([*lines, *(formulas or ["all of it counted on fake tensors"])])


def estimate_memory(
    model: nn.Module,
    rows: int,
    width: int,
    *,
    optimizer: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer] = "adamw_torch",
    bf16: bool = False,
    fp16: bool = False,
    gradient_checkpointing: bool = False,
    attn_implementation: str | None = None,
    target_width: int | None = None,
    inputs: Callable[[int, int], Inputs] | None = None,
    device: str | None = None,
    fsdp_ranks: int = 1,
) -> MemoryEstimate:
    """The peak memory of training with micro-batches of `rows` rows of `width` tokens.

    The model is neither run nor changed, and needs no weights: make it under `torch.device("meta")` and it takes no
    memory. What is predicted is a step of several micro-batches, once the optimizer has its states; rows are taken to
    differ in length, so that there is a mask.

    Args:
        model: in the dtype that it is trained in, with `requires_grad=False` where it is frozen; adapters of PEFT are
            frozen models.
        rows: rows of a micro-batch.
        width: tokens that its rows are padded to; for a model of images, pixels of a side.
        optimizer: a name that `TrainingArguments(optim=...)` takes ("adamw_torch", "adamw_torch_fused", "sgd",
            "adafactor", "adamw_bnb_8bit"), or a function that makes an optimizer of a list of parameters.
        bf16: autocast to bfloat16, as in `TrainingArguments`.
        fp16: autocast to float16.
        gradient_checkpointing: as in `TrainingArguments`.
        attn_implementation: "eager", "sdpa" or "flash_attention_2"; the model's own if left out.
        target_width: tokens of the labels of a sequence-to-sequence model, if not `width`.
        inputs: makes the inputs of the model from `rows` and `width`, where they are not those of a usual model with a
            head for the sequence, its tokens, language modelling, answers to questions, choices or images. Values do
            not matter.
        device: "cuda" or "cpu", whose kernels are counted; that of the model if left out. It need not be there.
        fsdp_ranks: ranks that FSDP shards parameters, gradients and optimizer states over.

    Raises:
        ValueError: an option has a value that it does not take, the model needs other inputs, or its operators depend
            on the values of tensors.

    Example:
        >>> with torch.device("meta"):
        ...     model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
        >>> estimate = estimate_memory(model, rows=8, width=512, bf16=True, device="cuda")
        >>> estimate.gradient_bytes == sum(4 * parameter.numel() for parameter in model.parameters())
        True
    """
    _check(rows, width, fsdp_ranks, bf16=bf16, fp16=fp16)
    dtype = torch.bfloat16 if bf16 else torch.float16 if fp16 else None
    device = _device(model, device)
    target_width = target_width or width
    if inputs is None:
        _check_positions(model, max(width, target_width))
    made_inputs = inputs(rows, width) if inputs else default_inputs(model, rows, width, target_width)
    with fake_tensors():
        twin = fake_twin(model).train()
        by_formula = _set_attention(twin, attn_implementation)
        if gradient_checkpointing:
            _enable_checkpointing(twin)
        estimate = _count(twin, fake_like(made_inputs), _optimizer(optimizer, twin, device), dtype, device)
        estimate = replace(estimate, by_formula=(*by_formula, *estimate.by_formula))
        if optimizer in EIGHT_BIT:
            estimate = _with_8_bit_states(estimate, twin)
        return _sharded(estimate, twin, fsdp_ranks) if fsdp_ranks > 1 else estimate


def _check(rows: int, width: int, fsdp_ranks: int, *, bf16: bool, fp16: bool) -> None:
    for name, value in {"rows": rows, "width": width, "fsdp_ranks": fsdp_ranks}.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} is not a number of {name}. Write 1 or more, without a fraction.")
    if bf16 and fp16:
        raise ValueError("bf16=True and fp16=True exclude each other. Leave one out.")


def _check_positions(model: nn.Module, width: int) -> None:
    """Fake tensors have no values, so that a position beyond the table of positions is not an error by itself."""
    if getattr(model, "main_input_name", None) == "pixel_values":
        return
    for name, _, places in tables_of_positions(model):
        if places < width:
            raise ValueError(
                f"width={width}: the model has positions for {places} tokens only ({name}). Write a smaller width, or "
                "make the model with more (max_position_embeddings in most configurations)."
            )


def tables_of_positions(model: nn.Module) -> Iterator[tuple[str, int, int]]:
    """The tables of learned positions by name, each with its size and with how many tokens it has places for.

    That of RoBERTa and its kin begins with places for padding.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and re.search(r"(position[^.]*|wpe)$", name):
            size = int(module.num_embeddings)
            yield name, size, size - (1 + module.padding_idx if module.padding_idx else 0)


def _device(model: nn.Module, device: str | None) -> str:
    own = next((parameter.device.type for parameter in model.parameters()), "cpu")
    chosen = device or ("cpu" if own == "meta" else own)
    if chosen not in ("cpu", "cuda"):
        raise ValueError(f'device={chosen!r}: kernels are known of "cuda" and "cpu". Write one of them.')
    return chosen


def _enable_checkpointing(twin: Any) -> None:
    """By the method's name since transformers 5.24, or by the one before."""
    names = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
    enable = next((getattr(twin, name) for name in names if hasattr(twin, name)), None)
    if enable is None:
        raise ValueError(
            f"gradient_checkpointing=True: {type(twin).__name__} has no method for it ({names[1]}). Leave it out, or "
            "checkpoint inside the model's own forward pass."
        )
    enable()


def _set_attention(twin: Any, implementation: str | None) -> tuple[str, ...]:
    """Chooses the attention of the twin; what that leaves to a formula."""
    chosen = implementation or getattr(getattr(twin, "config", None), "_attn_implementation", None)
    is_flash = "flash" in str(chosen)
    if implementation and not hasattr(twin, "set_attn_implementation"):
        raise ValueError(
            f"attn_implementation={implementation!r}: {type(twin).__name__} is no model of transformers, "
            "whose attention could be chosen. Leave it out."
        )
    if implementation or is_flash:
        twin.set_attn_implementation("sdpa" if is_flash else implementation)
    if not is_flash:
        return ()
    return (
        "activations of flash attention: taken as those of SDPA's kernels, which keep the same tensors, and a mask",
    )


def _optimizer(
    choice: str | Callable[[list[nn.Parameter]], torch.optim.Optimizer], twin: nn.Module, device: str
) -> torch.optim.Optimizer | None:
    """The optimizer of the twin's trainable parameters; `None` for one that is left to a formula."""
    parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    if not parameters:
        raise ValueError("All parameters of the model are frozen. Set requires_grad=True where it is to be trained.")
    if callable(choice):
        return choice(parameters)
    if choice in EIGHT_BIT:
        return None
    if choice not in OPTIMIZERS:
        names = ", ".join([*OPTIMIZERS, *EIGHT_BIT])
        raise ValueError(f"optimizer={choice!r} is not known. Write one of {names}, or a function that makes it.")
    return OPTIMIZERS[choice](parameters, device == "cuda")


EIGHT_BIT = ("adamw_bnb_8bit", "adamw_8bit")

OPTIMIZERS: dict[str, Callable[[list[nn.Parameter], bool], torch.optim.Optimizer]] = {
    "adamw_torch": lambda parameters, is_cuda: torch.optim.AdamW(parameters, foreach=is_cuda),
    "adamw_torch_fused": lambda parameters, _: torch.optim.AdamW(parameters, fused=True),
    "sgd": lambda parameters, is_cuda: torch.optim.SGD(parameters, foreach=is_cuda),
    "adafactor": lambda parameters, _: transformers.Adafactor(
        parameters, lr=1e-3, scale_parameter=False, relative_step=False
    ),
}
"""By their names in `TrainingArguments`. On CUDA, torch updates all parameters at once, which takes more memory."""


def _count(
    twin: Any, inputs: Inputs, optimizer: torch.optim.Optimizer | None, dtype: torch.dtype | None, device: str
) -> MemoryEstimate:
    """Runs a step on fake tensors: first the optimizer, so that its states are there when the micro-batch runs."""
    trainable = [parameter for parameter in twin.parameters() if parameter.requires_grad]
    with AllocationTracker() as tracker:
        for parameter in trainable:
            parameter.grad = torch.zeros_like(parameter)
        gradient_bytes = tracker.live_bytes
        if optimizer is not None:
            optimizer.step()
        state_bytes = tracker.live_bytes - gradient_bytes
        step_bytes = tracker.peak_bytes - tracker.live_bytes
        tracker.peak_bytes = before = tracker.live_bytes
        with CudaKernels() if device == "cuda" else nullcontext():
            _forward_and_backward(twin, inputs, dtype)
        activation_bytes = tracker.peak_bytes - before
    return MemoryEstimate(
        parameter_bytes=sum(tensor.nbytes for tensor in [*twin.parameters(), *twin.buffers()]),
        gradient_bytes=gradient_bytes,
        optimizer_bytes=state_bytes,
        activation_bytes=activation_bytes + sum(tensor.nbytes for tensor in inputs.values()),
        step_bytes=step_bytes,
        fixed_bytes=CUBLAS_WORKSPACE_BYTES if device == "cuda" else 0,
        by_formula=("libraries: the workspace of cuBLAS",) if device == "cuda" else (),
    )


def _forward_and_backward(twin: Any, inputs: Inputs, dtype: torch.dtype | None) -> None:
    with torch.autocast("cpu", dtype=dtype) if dtype else nullcontext():
        loss = _loss_in(twin(**inputs))
    if not isinstance(loss, torch.Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            f"{type(twin).__name__} gives no loss for the inputs {', '.join(inputs)}. Have inputs= make its labels, "
            'too, and the model return the loss, as outputs["loss"] or as the first of a tuple.'
        )
    backward(loss)


def _loss_in(outputs: Any) -> Any:
    """The loss where `Trainer` takes it from; `None` if there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get("loss")
    return outputs[0] if isinstance(outputs, (tuple, list)) else getattr(outputs, "loss", None)


def _with_8_bit_states(estimate: MemoryEstimate, twin: nn.Module) -> MemoryEstimate:
    """Two states of a byte a value, and scales, as bitsandbytes keeps them; embeddings in float32, as in Trainer."""
    embeddings = {id(module.weight) for module in twin.modules() if isinstance(module, nn.Embedding)}
    size = 0
    for parameter in twin.parameters():
        if parameter.requires_grad:
            values = parameter.numel()
            is_small = id(parameter) in embeddings or values < BNB_SMALLEST
            size += 2 * (4 * values if is_small else values + 4 * -(-values // BNB_BLOCK))
    formula = "optimizer states: two of 8 bits, embeddings and small parameters in float32"
    return replace(estimate, optimizer_bytes=size, by_formula=(*estimate.by_formula, formula))


def _sharded(estimate: MemoryEstimate, twin: nn.Module, ranks: int) -> MemoryEstimate:
    """Under FSDP with a unit a layer: two are gathered, one of them has its whole gradient, the rest is sharded.

    What belongs to no layer is gathered from the first layer to the last.
    """
    layers = [_bytes_of(layer) for held in twin.modules() if isinstance(held, nn.ModuleList) for layer in held]
    root = max(0, _bytes_of(twin) - sum(layers))
    layer = max(layers, default=0)
    gathered = root + 2 * layer + max(root, layer)
    return replace(
        estimate,
        parameter_bytes=-(-estimate.parameter_bytes // ranks),
        gradient_bytes=-(-estimate.gradient_bytes // ranks),
        optimizer_bytes=-(-estimate.optimizer_bytes // ranks),
        step_bytes=-(-estimate.step_bytes // ranks),
        activation_bytes=estimate.activation_bytes + gathered,
        by_formula=(*estimate.by_formula, f"FSDP: all but activations over {ranks} ranks, two layers gathered at once"),
    )


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters())


def default_inputs(model: Any, rows: int, width: int, target_width: int) -> dict[str, torch.Tensor]:
    """Inputs and labels of the usual models, on the meta device: what its main input and the name of its head ask for.

    Raises:
        ValueError: the model is of another kind.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, config = type(model).__name__, getattr(model, "config", None)

    def integers(*shape: int) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.long, device="meta")

    if getattr(model, "main_input_name", None) == "pixel_values" and "ImageClassification" in head:
        pixels = torch.empty((rows, getattr(config, "num_channels", 3), width, width), device="meta")
        return {"pixel_values": pixels, "labels": integers(rows)}
    shape = (rows, config.num_labels, width) if "MultipleChoice" in head else (rows, width)  # type: ignore[union-attr]
    texts = {"input_ids": integers(*shape), "attention_mask": integers(*shape)}
    if "SequenceClassification" in head or "MultipleChoice" in head:
        return {**texts, "labels": integers(rows)}
    if "QuestionAnswering" in head:
        return {**texts, "start_positions": integers(rows), "end_positions": integers(rows)}
    if getattr(config, "is_encoder_decoder", False):
        return {**texts, "labels": integers(rows, target_width)}
    if any(name in head for name in ("CausalLM", "LMHead", "MaskedLM", "TokenClassification")):
        return {**texts, "labels": integers(rows, width)}
    raise ValueError(
        f"The inputs of {head} are not known. Pass inputs=, a function of rows and width that makes them, labels "
        'included: inputs=lambda rows, width: {"input_ids": torch.zeros(rows, width, dtype=torch.long), ...}.'
    )


def estimate_max_tokens(model: nn.Module, width: int, memory_limit: str | int, **options: Any) -> int:
    """The budget, `max_tokens_per_micro_batch`, that a device with so much memory allows for rows of `width` tokens.

    Of an encoder-decoder it counts, as in training, the tokens of source and target together. A tenth of the memory is
    left to what is not counted: the CUDA context, scratch memory of kernels, fragmentation.

    Args:
        model: as in `estimate_memory`.
        width: tokens of the longest rows.
        memory_limit: the memory of the device: "24GiB", or bytes.
        options: those of `estimate_memory`.

    Raises:
        ValueError: not even one row fits, or `estimate_memory` raises it.

    Example:
        >>> with torch.device("meta"):
        ...     model = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=2))
        >>> estimate_max_tokens(model, 512, "8GiB") > estimate_max_tokens(model, 512, "4GiB") > 0
        True
    """
    limit = parse_memory_limit(memory_limit)
    if not isinstance(limit, int):
        raise ValueError(f'memory_limit={memory_limit!r} is not a size. Write the memory of the device, as "24GiB".')
    usable = int(DEFAULT_FRACTION * limit)
    one, two = (estimate_memory(model, rows, width, **options) for rows in (1, 2))
    if one.peak_bytes > usable:
        raise ValueError(
            f"memory_limit={memory_limit!r}: a row of {width} tokens needs {format_bytes(one.peak_bytes)}, and "
            f"{format_bytes(usable)} are used at most. Take shorter rows, gradient_checkpointing=True, bf16=True, "
            f"fewer trainable parameters or an optimizer with less state.\n{one}"
        )
    room = usable - one.resident_bytes
    rows = 1 + (room - one.activation_bytes) // max(1, two.activation_bytes - one.activation_bytes)
    while rows > 1 and (needed := estimate_memory(model, rows, width, **options).activation_bytes) > room:
        rows = max(1, min(rows - 1, rows * room // needed))
    return rows * (width + (options.get("target_width") or width if has_targets(model) else 0))
