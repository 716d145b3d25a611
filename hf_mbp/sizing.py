"""Applies planning and memory to the user's model: what its micro-batches cost and how large they may be."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from hf_mbp import memory, wrapped
from hf_mbp.arrays import Ints
from hf_mbp.byte_sizes import parse_memory_limit
from hf_mbp.collate import num_rows_of
from hf_mbp.fit import Measured, fit_budget, held_out_error
from hf_mbp.gauge import Gauge
from hf_mbp.optimizer_memory import step_bytes
from hf_mbp.out_of_memory import unless_out_of_memory
from hf_mbp.padding import can_be_cut, cut_columns, with_padding
from hf_mbp.plan import Budget, Cost, Layout
from hf_mbp.probe import loss_of, modules_of
from hf_mbp.undisturbed import kept_collator, undisturbed

PROBE_CELLS, PROBE_ROWS = 512, (2, 8)
"""Cells of a narrow micro-batch that is run to measure its memory: from here on bytes per cell hardly change. Not more
rows, though, of images or sounds, which no one counts in cells, and not one, which batch normalisation refuses."""

NARROW, WIDE = 32, 512
"""Widths at which memory is measured, if rows are that long: far enough apart to tell what grows with their square. Of
shorter rows it is measured at their whole width and at half of it."""

LEFT = 0.5
"""Share of the room for activations that copies of the weights have to leave to what is measured. Frozen weights, which
have neither gradients nor optimizer states, may take almost all of it."""


@dataclass(frozen=True, kw_only=True)
class DeviceClass:
    """What a kind of device does in a second, in orders of magnitude, for the cost model of the planner.

    `queues` says that the device computes while its host launches what comes next, so that only the longer counts.
    `cache_bytes`, if given, is what it keeps near: what a layer leaves there for the next is read again from memory,
    which takes longer, where it is more.
    """

    flops: float
    bytes: float
    launches: float
    queues: bool = False
    cache_bytes: float | None = None


DEVICE_CLASSES = {
    "cpu": DeviceClass(flops=1e11, bytes=1e10, launches=1e5, cache_bytes=2**24),  # a few cores
    "mps": DeviceClass(flops=5e12, bytes=2e11, launches=5e4),
    "cuda": DeviceClass(flops=1e14, bytes=1e12, launches=1e5, queues=True),  # 10 us a launch, its Python included
}
"""Constants and not measurements, so that plans are the same in every run."""

OPERATORS_PER_LAYER = 60
"""Kernels that forward and backward of a transformer layer launch."""

VECTORS_PER_CELL = 10
"""Of the size of a hidden state, that a transformer layer makes of each position: queries, keys, values, what attention
gives before and after its last weights, four in the feed-forward part, and what that gives."""

FORWARD = 1 / 3
"""Share of operations and kernels that are those of the forward pass: the backward pass multiplies twice as often, with
weights and with activations."""


def cost_of(model: torch.nn.Module, device: torch.device, *, forward_only: bool = False) -> Cost:
    """The cost model for the planner, from the shape of the model and the kind of device.

    A cell costs six floating point operations for each weight it is multiplied with, forward and backward together;
    a pair of positions twelve for each layer and hidden unit. A micro-batch costs the launch of its kernels, and
    reading and writing each trainable parameter's gradient, whatever its size. Where the device queues what is
    launched, the launches are hidden behind the computation, and are the least that it takes. Where a cache is small
    enough to matter, as on a CPU, this holds as long as the cache holds what a layer makes.

    Without a backward pass, as in evaluation (`forward_only`), there are no gradients, and a third of the rest.
    """
    share = FORWARD if forward_only else 1.0
    speed = DEVICE_CLASSES.get(device.type, DEVICE_CLASSES["cuda"])
    layers, hidden = _shape(model)
    summed = [] if forward_only else [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradient_bytes = 3 * sum(wrapped.num_elements(parameter) * parameter.element_size() for parameter in summed)
    cell = share * 6.0 * max(1, _multiplied_weights(model))
    to_launch, to_add = share * OPERATORS_PER_LAYER * max(1, layers) / speed.launches, gradient_bytes / speed.bytes
    overhead, floor = (to_add, to_launch) if speed.queues else (to_launch + to_add, 0.0)
    cells_per_second = speed.flops / cell
    return Cost(
        overhead=overhead * cells_per_second,
        cell=1.0,
        attention=share * 12.0 * layers * hidden / cell,
        floor=floor * cells_per_second,
        most_cells=_cells_in_cache(model, hidden, speed.cache_bytes),
    )


def _cells_in_cache(model: torch.nn.Module, hidden: int, cache_bytes: float | None) -> float | None:
    """Cells of which a layer makes no more than the cache holds; `None` where there is no telling."""
    weight = next((parameter for parameter in model.parameters() if parameter.is_floating_point()), None)
    if cache_bytes is None or not hidden or weight is None:
        return None
    return cache_bytes / (VECTORS_PER_CELL * hidden * weight.element_size())


def _shape(model: torch.nn.Module) -> tuple[int, int]:
    """Layers and hidden units; zeros where the model does not say."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    return int(getattr(config, "num_hidden_layers", 0) or 0), int(getattr(config, "hidden_size", 0) or 0)


def _multiplied_weights(model: torch.nn.Module) -> int:
    """Weights each token is multiplied with: all but those of embeddings, which are looked up."""
    embeddings = {id(m.weight): m.weight for m in model.modules() if isinstance(m, torch.nn.Embedding)}
    looked_up = sum(wrapped.num_elements(weight) for weight in embeddings.values())
    head: Any = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    tied = wrapped.num_elements(head.weight) if head is not None and id(head.weight) in embeddings else 0
    return sum(wrapped.num_elements(parameter) for parameter in model.parameters()) - looked_up + tied


@dataclass(frozen=True, kw_only=True)
class Sizing:
    """A budget sized from memory, the room it was sized for, and how well it predicts a shape it was not fitted to.

    `held_out_error` is relative; `None` if there was no memory to measure one more shape.
    """

    budget: Budget
    room: memory.Room
    held_out_error: float | None


def measure_budget(trainer: Any, rows: list[Any], sizes: Ints) -> Sizing:
    """The budget that the free memory allows, from the memory that a few small micro-batches need.

    They are made of the longest row, cut to several widths and repeated, so that what grows with the rows, with the
    width, and with its square shows. A row that cannot be cut is measured as it is, several times over: what grows with
    its square is then counted for shorter ones, too. Of all but the smallest, what there is no memory for is left out:
    micro-batches of a step that run out of it are run again.

    Raises:
        ValueError: the model is sharded, or no memory is left.
    """
    if wrapped.is_sharded(trainer):
        raise ValueError(
            "The budget cannot be sized from memory under FSDP and DeepSpeed yet: set max_tokens_per_micro_batch, for "
            "example to the tokens of the largest batch that fits without micro-batches."
        )
    lengths = sizes.sum(axis=1)
    longest = int(lengths.max())
    row = rows[int(lengths.argmax())]
    most = _room(trainer).activation_bytes
    with undisturbed(modules_of(trainer), beside=int(LEFT * most)), kept_collator(trainer.data_collator):
        trainer.model.train()
        is_cut = _can_be_cut(trainer, row)
        fitted, held_out = probe_shapes(longest, is_cut=is_cut)
        measured = [_measure(trainer, row, *fitted[0], is_cut=is_cut)]
        for shape in (*fitted[1:], held_out):
            if is_cut or shape[0] / measured[0][0] * measured[0][2] < most:
                further = unless_out_of_memory(partial(_measure, trainer, row, *shape, is_cut=is_cut))
                measured += [] if further is None else [further]
    error = held_out_error(measured[:-1], measured[-1]) if len(measured) > len(fitted) else None
    Gauge(trainer.args.device).release()  # what was needed to measure is not what training holds
    room = _room(trainer)
    return Sizing(budget=fit_budget(measured, room.activation_bytes), room=room, held_out_error=error)


def probe_shapes(longest: int, *, is_cut: bool) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Shapes, `(rows, width)`, to fit bytes to, and one to hold out, for rows up to `longest`.

    Example:
        >>> probe_shapes(2000, is_cut=True), probe_shapes(1, is_cut=False)
        (([(2, 32), (16, 32), (2, 512)], (4, 128)), ([(2, 1), (8, 1)], (5, 1)))
    """
    fewest, most = PROBE_ROWS
    most = 2 * most if is_cut else most
    if not is_cut or longest == 1:
        many = min(most, max(2 * fewest, -(-PROBE_CELLS // longest)))
        return [(fewest, longest), (many, longest)], ((fewest + many) // 2, longest)
    wide = min(longest, WIDE)
    narrow = min(NARROW, wide // 2)
    between = round((narrow * wide) ** 0.5)
    held_out = min((fewest + most) // 2, max(2 * fewest, PROBE_CELLS // between)), between
    return [(fewest, narrow), (most, narrow), (min(most, max(fewest, PROBE_CELLS // wide)), wide)], held_out


def _room(trainer: Any) -> memory.Room:
    parameters = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    pending = memory.pending_training_bytes(
        parameters, trainer.optimizer, accumulates_in_fp32=trainer.mbp_config.accumulate_in_fp32
    )
    limit = parse_memory_limit(trainer.mbp_config.memory_limit)
    for_a_step = step_bytes(trainer.optimizer, parameters)
    return memory.room_for_training(trainer.args.device, limit, pending, step_bytes=for_a_step)


def _can_be_cut(trainer: Any, row: Any) -> bool:
    (inputs,) = trainer.mbp_rows.collate([[row, row]])
    return can_be_cut(inputs) and num_rows_of(inputs) == 2


def _measure(trainer: Any, row: Any, num_rows: int, width: int, *, is_cut: bool) -> Measured:
    """Peak bytes of a micro-batch of a row repeated, cut to `width` or not, and what shape it really counts as."""
    reader = trainer.mbp_rows
    (inputs,) = reader.collate([[row] * num_rows])
    if is_cut:
        inputs = cut_columns(inputs, width)
    padded, inputs = inputs, reader.arranged(inputs)
    is_padded = inputs is padded
    if is_cut and is_padded:
        inputs = with_padding(inputs)
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    num_items = max(1.0, trainer.num_items(inputs))

    def run() -> None:
        loss_of(trainer, inputs, num_items).backward()  # type: ignore[no-untyped-call]

    cells = reader.num_cells(inputs)  # targets and further choices are cut otherwise, or not at all
    layout = Layout.PADDED if is_padded else reader.layout
    rows, wide = layout.shape(num_rows, num_rows * width if cells is None else cells)
    return rows, float(wide), memory.measure_activations(run)
