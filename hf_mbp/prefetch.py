"""Copies the inputs of the next micro-batch to the device while this one computes."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from hf_mbp.collate import Inputs
from hf_mbp.step import MicroBatch

HAVE_STREAMS = ("cuda", "xpu")
"""Kinds of devices that copy on one stream while they compute on another."""


class Prefetch:
    """The inputs of the micro-batches of a mini-batch, on the device, one micro-batch ahead.

    A plain copy to a GPU has the host wait until the GPU has done all that it was given before; then the GPU waits
    until the host has launched the next kernels. Here inputs are copied from pinned memory on a stream of their own,
    and neither waits. `Trainer._prepare_inputs` leaves what lies on the device as it is.

    Does nothing on devices without streams: a CPU has no copies to make.

    Args:
        device: where micro-batches run.
        pins: whether inputs are copied to pinned memory first (`dataloader_pin_memory`).
    """

    def __init__(self, device: torch.device, *, pins: bool) -> None:
        self._device = device
        self._pins = pins
        self._left: deque[MicroBatch] = deque()
        self._ahead: Inputs | None = None

    def start(self, micro_batches: Sequence[MicroBatch]) -> None:
        """Forgets what was copied ahead; from here on these run, in this order, except for the idle ones."""
        self._ahead = None
        streams = self._device.type in HAVE_STREAMS
        self._left = deque(micro_batch for micro_batch in micro_batches if streams and not micro_batch.is_idle)

    @contextmanager
    def on_device(self, micro_batch: MicroBatch) -> Iterator[Inputs]:
        """Its inputs, and those of the next one on their way.

        If the block fails, nothing that was copied ahead is kept: there may have been no memory. One that is not next
        in the order (it only keeps in step with other ranks) stays on the host.
        """
        try:
            yield self._inputs(micro_batch)
        except BaseException:
            self.start([])
            raise

    def _inputs(self, micro_batch: MicroBatch) -> Inputs:
        if not self._left or self._left[0] is not micro_batch:
            return dict(micro_batch.inputs)
        self._left.popleft()
        inputs = self._copied(micro_batch.inputs) if self._ahead is None else self._ahead
        self._hand_over(inputs)  # before the next is copied: it waits for all that the stream has to do
        self._ahead = self._copied(self._left[0].inputs) if self._left else None
        return inputs

    def _copied(self, inputs: Inputs) -> Inputs:
        """On their way to the device; the host does not wait for them."""
        with torch.get_device_module(self._device).stream(_copying_stream(self._device)):
            return {name: self._moved(value) for name, value in inputs.items()}

    def _moved(self, value: Any) -> Any:
        """Tensors at any depth, as `Trainer._prepare_input` finds them; others are left to it."""
        if isinstance(value, Mapping):
            return type(value)({name: self._moved(inner) for name, inner in value.items()})  # type: ignore[call-arg]
        if isinstance(value, (tuple, list)):
            return type(value)(self._moved(inner) for inner in value)
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu" or value.layout != torch.strided:
            return value
        return (value.pin_memory() if self._pins else value).to(self._device, non_blocking=True)

    def _hand_over(self, inputs: Inputs) -> None:
        """Has the stream that computes wait for the copies, and the allocator know that it uses them."""
        computing = torch.get_device_module(self._device).current_stream(self._device)
        computing.wait_stream(_copying_stream(self._device))
        for tensor in _tensors_in(inputs):
            if tensor.device.type == self._device.type:
                tensor.record_stream(computing)


@cache
def _copying_stream(device: torch.device) -> Any:
    """The stream that inputs are copied on. One for all: memory that was used on a stream is kept for that stream."""
    return torch.get_device_module(device).Stream(device)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (Mapping, tuple, list)):
        for inner in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(inner)
