"""The states of all random number generators, taken down and put back."""

import random
from collections.abc import Iterable
from typing import Any, TypeAlias

import numpy as np
import torch

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
