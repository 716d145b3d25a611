"""Puts the outputs of micro-batches together, on the host and in the order of the rows."""

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

Follows = list[set[int]]
"""For each tensor of an output the dimensions that are as wide as the inputs are padded."""


class RowOutputs:
    """The outputs of a batch, filled in by its micro-batches: tensors in tuples, lists and mappings.

    A tensor has an entry for each example, or two (see `EvalBatch`), and the other dimensions of the widest
    micro-batch, filled up with `fill`. Those that follow the width of the inputs are as wide as the batch is.

    Args:
        num_examples: of the batch.
        fill: what stands where a micro-batch has no columns.
        follows: see `Follows`; `None` for the second dimension of each tensor.
    """

    def __init__(self, num_examples: int, *, fill: int, follows: Follows | None = None) -> None:
        self._num_examples = num_examples
        self._fill = fill
        self._follows = follows
        self._tensors: list[Any] = []
        self._structure: Any = None

    def put(self, outputs: Any, examples: list[int], widths: list[int], batch_widths: list[int]) -> None:
        """Fills in what the `examples` gave, whose inputs were padded to `widths`."""
        leaves, self._structure = tree_flatten(outputs)
        self._tensors = self._tensors or [None] * len(leaves)
        grown = list(zip(widths, batch_widths, strict=True))
        for position, leaf in enumerate(leaves):
            if not isinstance(leaf, torch.Tensor):
                self._tensors[position] = leaf
                continue
            rows_each = len(leaf) // len(examples)
            shape = (
                rows_each * self._num_examples,
                *(self._size(leaf.shape[dim], position, dim, grown) for dim in range(1, leaf.ndim)),
            )
            canvas = self._tensors[position] = self._grown(self._tensors[position], leaf, shape)
            rows = torch.tensor([part * self._num_examples + row for part in range(rows_each) for row in examples])
            inside: Any = (rows, *(slice(size) for size in leaf.shape[1:]))
            canvas[inside] = leaf.detach().cpu()

    def _size(self, size: int, position: int, dim: int, widths: list[tuple[int, int]]) -> int:
        follows = dim == 1 if self._follows is None else dim in self._follows[position]
        return next((whole for width, whole in widths if width == size and follows), size)

    def _grown(self, canvas: torch.Tensor | None, leaf: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        if canvas is not None:
            shape = tuple(max(sizes) for sizes in zip(canvas.shape, shape, strict=True))
            if canvas.shape == shape:
                return canvas
        fill = False if leaf.dtype == torch.bool else self._fill
        larger = torch.full(shape, fill, dtype=leaf.dtype)
        if canvas is not None:
            larger[tuple(slice(size) for size in canvas.shape)] = canvas
        return larger

    @property
    def value(self) -> Any:
        """The outputs of all examples; `None` if there were none."""
        return None if self._structure is None else tree_unflatten(self._tensors, self._structure)


def to_device(outputs: Any, device: torch.device | str) -> Any:
    """Outputs with their tensors on a device."""
    leaves, structure = tree_flatten(outputs)
    return tree_unflatten([leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves], structure)


def num_bytes(outputs: Any) -> int:
    """Bytes of the tensors of some outputs."""
    return sum(
        leaf.numel() * leaf.element_size() for leaf in tree_flatten(outputs)[0] if isinstance(leaf, torch.Tensor)
    )
