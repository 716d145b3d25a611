"""Random numbers: the states of generators, taken down and put back, and blocks of code with numbers of their own."""

import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

RandomStates: TypeAlias = tuple[Any, ...]
"""Of Python, numpy and torch, there on the host and on devices."""

HAVE_GENERATORS = ("cuda", "mps", "xpu")
"""Kinds of devices that draw their own numbers."""


def random_states(devices: Iterable[torch.device]) -> RandomStates:
    """The states now, on the host and on those of the devices that have some."""
    own = {device for device in devices if device.type in HAVE_GENERATORS}
    on_devices = [(device, _device_module(device).get_rng_state(*_index_of(device))) for device in own]
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), on_devices


def put_back_random_states(states: RandomStates) -> None:
    """Makes the states those of then."""
    python, numpy, host, on_devices = states
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(host)
    for device, state in on_devices:
        _device_module(device).set_rng_state(state, *_index_of(device))


def _device_module(device: torch.device) -> Any:
    return torch.get_device_module(device.type)


def _index_of(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Random numbers that depend on `key` alone, for collators that draw them; the states before are restored.

    Example:
        >>> with seeded(42, 0, 0):
        ...     first = torch.rand(1)
        >>> with seeded(42, 0, 0):
        ...     bool(torch.rand(1) == first)
        True
    """
    states = random_states(())
    seeds = np.random.SeedSequence([abs(part) for part in key]).generate_state(3).tolist()
    try:
        random.seed(seeds[0])
        np.random.seed(seeds[1])
        torch.default_generator.manual_seed(seeds[2])
        yield
    finally:
        put_back_random_states(states)


@contextmanager
def own_random_numbers(modules: list[nn.Module]) -> Iterator[None]:
    """The same random numbers whenever the block is run; those outside go on as if it had not been."""
    devices = {tensor.device.index or 0 for m in modules for tensor in m.parameters() if tensor.device.type == "cuda"}
    if torch.cuda.is_available():
        devices.add(torch.cuda.current_device())
    with torch.random.fork_rng(devices=sorted(devices)), seeded(0):
        reseed(0, modules)
        yield


def reseed(seed: int, modules: list[nn.Module]) -> None:
    """The same random numbers from here on, on every device that the modules are on."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    for device in {tensor.device for module in modules for tensor in module.parameters()}:
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)


def is_generator(value: Any) -> bool:
    """Whether it is a random generator that `restorer` knows."""
    return isinstance(value, (torch.Generator, random.Random, np.random.Generator, np.random.RandomState))


def restorer(generator: Any) -> Callable[[], Any]:
    """What puts a random generator into the state it has now; does nothing for anything else."""
    if isinstance(generator, torch.Generator):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    return lambda: None
