"""Copies in the place of a model's tensors, and its attributes noted, so that it can be run and put back as it was."""

import copy
import operator
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from hf_mbp import device_memory, memory, wrapped
from hf_mbp.random_numbers import restorer

HALF = (torch.float16, torch.bfloat16)

REGISTERED = frozenset(("_parameters", "_buffers", "_modules"))
"""Attributes of a module that are put back otherwise. Its hooks are not among them: transformers installs some in the
first forward pass, and remembers that in an attribute."""

CONTAINERS = (list, dict, set, deque)


Registered = list[tuple[nn.Module, dict[str, Any] | None, dict[str, Any]]]
"""Modules with the parameters and buffers they have."""


class StandIns:
    """Copies in the place of a model's tensors, so that nothing reaches the originals; and its attributes, noted.

    Parameters are replaced by other `Parameter`s, rather than given other values: the optimizer, and the hooks by which
    DDP reduces gradients, hold on to the originals. Not copied are parameters of other kinds, quantized or sharded,
    which no forward pass changes.

    Args:
        modules: to be run on the side.
        half_as: the dtype of the copies of floating tensors in half precision; `None` for their own.
        beside: bytes on each device that have to be left beside the copies of parameters, or fewer or none are made.
    """

    def __init__(self, modules: list[nn.Module], half_as: torch.dtype | None = None, *, beside: int = 0) -> None:
        self.modules = list(dict.fromkeys(module for held in modules for module in held.modules()))
        self._half_as = half_as
        self._beside = beside
        self._is_sharded = wrapped.holds_shards(self.modules)
        wrapped.reshard(self.modules)
        self._parameters = [(m, name, p) for m in self.modules for name, p in m._parameters.items() if p is not None]
        self._buffers = [(m, name, b) for m in self.modules for name, b in m._buffers.items() if b is not None]
        self._gradients = [(parameter, parameter.grad) for _, _, parameter in self._parameters]
        configs = [config for m in self.modules if hasattr(config := vars(m).get("config"), "__dict__")]
        self._holders = [*self.modules, *{id(config): config for config in configs}.values()]
        self._originals = [Attributes(holder) for holder in self._holders]
        self._copies: dict[int, torch.Tensor] = {}
        self._registered_first = self._now_registered()
        try:
            self._put_in()
        except BaseException:  # there may be no memory for the copies: half of them would be trained
            self.put_back()
            raise
        self.remember()

    def _put_in(self) -> None:
        are_copied = self._to_be_copied()
        for module, name, parameter in self._parameters:
            parameter.grad = None
            if id(parameter) in are_copied:
                setattr(module, name, self._copy(parameter))
        for module, name, buffer in self._buffers:
            module._buffers[name] = self._copy(buffer)
        for holder in self._originals:
            for name, value in holder.tensors():
                vars(holder.owner)[name] = self._copy(value)

    def _to_be_copied(self) -> set[int]:
        """Parameters whose copies fit: all, those that are trained, or none. What a forward pass does to others stays.

        In another dtype it is all or none of them.
        """
        if self._is_sharded:
            return set()
        plain = {id(parameter): parameter for *_, parameter in self._parameters if type(parameter) is nn.Parameter}
        trained = {key: parameter for key, parameter in plain.items() if parameter.requires_grad}
        choices = [plain, trained] if self._half_as is None else [plain]
        return next((set(chosen) for chosen in choices if self._have_room(chosen.values())), set())

    def _have_room(self, parameters: Iterable[nn.Parameter]) -> bool:
        needed: dict[torch.device, int] = {}
        for parameter in parameters:
            size = parameter.numel() * torch.empty(0, dtype=self._dtype(parameter)).element_size()
            needed[parameter.device] = needed.get(parameter.device, 0) + size
        return all(
            device.type == "meta" or size + self._beside <= memory.DEFAULT_FRACTION * device_memory.free_memory(device)
            for device, size in needed.items()
        )

    def _dtype(self, tensor: torch.Tensor) -> torch.dtype:
        return self._half_as if self._half_as is not None and tensor.dtype in HALF else tensor.dtype

    def _copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """One copy of a tensor, wherever it is asked for: what was tied stays tied."""
        if id(tensor) not in self._copies:
            value = tensor.detach().to(self._dtype(tensor), copy=True)
            is_parameter = isinstance(tensor, nn.Parameter)
            needs_gradient = tensor.requires_grad and (is_parameter or tensor.is_leaf)
            self._copies[id(tensor)] = (
                nn.Parameter(value, needs_gradient) if is_parameter else value.requires_grad_(needs_gradient)
            )
        return self._copies[id(tensor)]

    def remember(self) -> None:
        """Makes the attributes of this moment, such as training flags, those that `reset` returns to."""
        self._attributes = [Attributes(holder) for holder in self._holders]
        self._registered = self._now_registered()

    def _now_registered(self) -> Registered:
        """What modules have; not parameters of FSDP 2, which exchanges them, whole and sharded, by itself."""
        return [(m, None if self._is_sharded else dict(m._parameters), dict(m._buffers)) for m in self.modules]

    def reset(self) -> None:
        """Puts everything back as it was at the start, but for what `remember` noted; the copies stay in place."""
        for tensor in self._tensors():
            if id(tensor) in self._copies:
                with torch.no_grad():
                    self._copies[id(tensor)].data.copy_(tensor)
        self._register(self._registered)
        for attributes in self._attributes:
            attributes.put_back()

    def changed(self) -> list[str]:
        """Names of the parameters, buffers and attributes that are not as `reset` leaves them."""
        names = {module: name for held in self.modules[:1] for name, module in held.named_modules()}
        found = [
            (module, name)
            for module, name, tensor in [*self._parameters, *self._buffers]
            if id(tensor) in self._copies and not _same(getattr(module, name, None), self._copies[id(tensor)], tensor)
        ]
        held = [attributes for attributes in self._attributes if isinstance(attributes.owner, nn.Module)]
        found += [(attributes.owner, name) for attributes in held for name in attributes.changed()]
        return [f"{names[module]}.{name}".lstrip(".") for module, name in found if module in names]

    def put_back(self) -> None:
        """Puts the originals back."""
        self._register(self._registered_first)
        for parameter, gradient in self._gradients:
            parameter.grad = gradient
        for attributes in self._originals:
            attributes.put_back(with_generators=True)

    def _register(self, registered: Registered) -> None:
        wrapped.reshard(self.modules)
        for module, parameters, buffers in registered:
            if parameters is not None:
                _register_parameters(module, parameters)
            module._buffers.clear()
            module._buffers.update(buffers)

    def _tensors(self) -> Iterator[torch.Tensor]:
        yield from (parameter for _, _, parameter in self._parameters)
        yield from (buffer for _, _, buffer in self._buffers)
        yield from (tensor for attributes in self._originals for _, tensor in attributes.tensors())


def _register_parameters(module: nn.Module, parameters: dict[str, Any]) -> None:
    for name in module._parameters.keys() - parameters.keys():
        del module._parameters[name]
    for name, parameter in parameters.items():
        if module._parameters.get(name) is not parameter:
            setattr(module, name, parameter)  # an LSTM keeps a list of its parameters, which this updates


def _same(now: Any, copied: torch.Tensor, original: torch.Tensor) -> bool:
    before = original.detach().to(copied.dtype)
    return (
        now is copied
        and now.shape == before.shape
        and bool(((copied == before) | ((copied != copied) & (before != before))).all())  # also where not a number
    )


class Attributes:
    """The attributes of an object, what its lists and dictionaries hold, and the states of its random generators."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self._skipped = REGISTERED if isinstance(owner, nn.Module) else frozenset()
        self._values = self._now()
        self._held = [(value, copy.copy(value)) for value in self._values.values() if isinstance(value, CONTAINERS)]
        self._restore = [restorer(value) for value in self._values.values()]

    def _now(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.owner).items() if name not in self._skipped}

    def tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [(name, value) for name, value in self._values.items() if isinstance(value, torch.Tensor)]

    def put_back(self, *, with_generators: bool = False) -> None:
        attributes = vars(self.owner)
        for name in self._now().keys() - self._values.keys():
            del attributes[name]
        attributes.update(self._values)
        for container, content in self._held:
            container.clear()
            (container.extend if isinstance(container, (list, deque)) else container.update)(content)
        for restore in self._restore if with_generators else ():
            restore()

    def changed(self) -> list[str]:
        """Names of attributes that are another object now, or a number of another value."""
        now = self._now()
        return [name for name, value in now.items() if not _is_alike(value, self._values.get(name))]

    def is_as_then(self) -> bool:
        """Whether nothing has changed: no attribute was set, and no container among them holds anything else."""
        held = all(_holds_the_same(container, content) for container, content in self._held)
        return self._now().keys() == self._values.keys() and not self.changed() and held


def _is_alike(one: Any, other: Any) -> bool:
    return one is other or (isinstance(one, (int, float, str)) and type(one) is type(other) and one == other)


def _holds_the_same(container: Any, content: Any) -> bool:
    """The same objects, in the same places."""
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        return all(name in container and container[name] is value for name, value in content.items())
    return container == content if isinstance(container, set) else all(map(operator.is_, container, content))
