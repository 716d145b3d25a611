"""Keeps a rank whose forward or backward pass was cut short in step with the collectives of the others.

The others wait for it: for the parameters of the next layer under FSDP, or for numbers that a loss gathers. Which
collectives a pass makes, and in which order, is the same on all ranks. So the rank runs a pass over a few rows, and
leaves out of it as many collectives as it had already made when it was cut short: the rest pair up with those that the
others are waiting in. Nothing that is computed there counts.
"""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from hf_mbp import wrapped

Counts = dict[str, int]
"""Collectives made in each process group so far, by its name."""


class LeavingOut(TorchDispatchMode):
    """A context that leaves out as many collectives of each group as were made since `before`.

    They are answered without communication, and their outputs left as they are.
    """

    def __init__(self, before: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._left = {name: now - before.get(name, 0) for name, now in wrapped.sequence_numbers().items()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = wrapped.group_of_collective(func, args)
        if name is None or self._left[name] <= 0:
            return func(*args, **(kwargs or {}))
        self._left[name] -= 1
        return wrapped.without_communication(func, args)
