"""Trains with a loss that compares all rows of a mini-batch, as contrastive ones do, by running each row twice.

    1. every micro-batch runs forward, without a graph: the embeddings of all rows, of all ranks
    2. the loss of all embeddings, and its gradient at each of them
    3. every micro-batch runs again, forward from the same random state, and backward from the gradients of its rows

By the chain rule the gradient is that of the whole mini-batch, and only one micro-batch has a graph at a time. After
Gao, Zhang, Han and Callan, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", 2021
(arXiv 2101.06983), where it is called gradient cache.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from hf_mbp import compat
from hf_mbp.collate import Inputs
from hf_mbp.distributed import Ranks
from hf_mbp.random_numbers import RandomStates, put_back_random_states, random_states

Leaves = list[torch.Tensor]
"""Tensors, `[rows, ...]` each, in the order in which they lie in what `embed_rows` returned."""


@runtime_checkable
class EmbedsRows(Protocol):
    """What a trainer defines so that its micro-batches run in two passes."""

    def embed_rows(self, model: torch.nn.Module, inputs: Inputs) -> Any:
        """What the loss compares of the rows of collated `inputs`, which are on the device.

        A tensor, or a tuple, list or dictionary of tensors, all `[rows, ...]`. A row must not depend on the others.
        Tensors of integers, such as classes of the rows, are handed on without a gradient.
        """

    def loss_of_embeddings(self, embeddings: Any) -> torch.Tensor:
        """The loss of a whole mini-batch: one number.

        `embeddings` are like those of `embed_rows`, with the rows of all micro-batches and ranks, in any order, which
        is the same in all tensors. Those in half precision have become float32.
        """


@dataclass(frozen=True, kw_only=True)
class Part:
    """Inputs that run together, under a key of their own; of a share of zero only so that this rank takes part."""

    key: object
    inputs: Inputs
    share: float


@dataclass(frozen=True, kw_only=True)
class _Second:
    """What the second pass of a part needs: the random state of the first, and the gradients of its embeddings."""

    states: RandomStates
    gradients: list[torch.Tensor | None]
    loss: torch.Tensor
    share: float


@dataclass(frozen=True, kw_only=True)
class _Embedded:
    """A part after the first pass."""

    part: Part
    states: RandomStates
    leaves: Leaves
    spec: TreeSpec

    @property
    def num_rows(self) -> int:
        return len(self.leaves[0])


class TwoPasses:
    """The passes of one trainer, which is an `EmbedsRows`, and its `compute_loss`."""

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._seconds: dict[int, _Second] = {}
        self._is_second = False
        self._current: _Second | None = None

    def first(self, model: torch.nn.Module, parts: Sequence[Part], ranks: Ranks | None = None) -> None:
        """The first pass of all parts, and the loss of what they embed on these ranks; of the parts alone, if `None`.

        Parameters that the loss itself has get their gradient here, which is the same on all ranks.
        """
        self._seconds = {}
        with torch.no_grad():
            embedded = [self._embedded(model, part) for part in parts]
        own = [_joined(column) for column in zip(*(_counted(one) for one in embedded), strict=True)]
        leaves = own if ranks is None or ranks.count == 1 else _of_all_ranks(own, ranks)
        scale = compat.loss_scale(self._trainer.accelerator)
        with self._trainer.compute_loss_context_manager():
            loss = _checked(self._trainer.loss_of_embeddings(tree_unflatten(leaves, embedded[0].spec)))
        (loss * scale).backward()  # type: ignore[no-untyped-call]
        gradients = [None if leaf.grad is None else leaf.grad / scale for leaf in own]
        start = 0
        for one in embedded:
            end = start + (one.num_rows if one.part.share else 0)
            self._seconds[id(one.part.key)] = _Second(
                states=one.states,
                gradients=[None if gradient is None else gradient[start:end] for gradient in gradients],
                loss=loss.detach(),
                share=one.part.share,
            )
            start = end

    def _embedded(self, model: torch.nn.Module, part: Part) -> _Embedded:
        states = random_states({self._trainer.args.device})
        inputs = compat.prepare_inputs(self._trainer, part.inputs)
        with self._trainer.compute_loss_context_manager():
            leaves, spec = _flattened(self._trainer.embed_rows(model, inputs))
        return _Embedded(part=part, states=states, leaves=leaves, spec=spec)

    @contextmanager
    def second(self, key: object) -> Iterator[None]:
        """Within it `compute_loss` is called with the inputs of that part; one that was no part adds nothing."""
        self._is_second, self._current = True, self._seconds.get(id(key))
        try:
            yield
        finally:
            self._is_second, self._current = False, None

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: Inputs,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,  # noqa: ARG002
    ) -> Any:
        """In a second pass the loss of the mini-batch, with the gradient of these rows; else the loss of these rows."""
        if not self._is_second:
            embeddings = self._trainer.embed_rows(model, inputs)
            loss = _checked(self._trainer.loss_of_embeddings(embeddings))
            return (loss, {"embeddings": embeddings}) if return_outputs else loss
        second = self._current
        if second is None or not second.share:
            leaves, _ = _flattened(self._trainer.embed_rows(model, inputs))
            return sum((leaf.sum() * 0 for leaf in leaves if leaf.requires_grad), torch.zeros(()))
        put_back_random_states(second.states)
        leaves, _ = _flattened(self._trainer.embed_rows(model, inputs))
        pulls = [
            (_at_least_float32(leaf) * gradient).sum()
            for leaf, gradient in zip(leaves, second.gradients, strict=True)
            if gradient is not None
        ]
        pull = torch.stack(pulls).sum() / second.share
        return pull - pull.detach() + second.loss


def _at_least_float32(leaf: torch.Tensor) -> torch.Tensor:
    return leaf.float() if leaf.is_floating_point() and leaf.dtype.itemsize < 4 else leaf


def _flattened(embeddings: Any) -> tuple[Leaves, TreeSpec]:
    """The tensors in it.

    Raises:
        TypeError: there is something else in it, or nothing.
        ValueError: they do not have equally many rows.
    """
    leaves, spec = tree_flatten(embeddings)
    if not leaves or not all(isinstance(leaf, torch.Tensor) and leaf.ndim for leaf in leaves):
        raise TypeError(
            f"embed_rows must return a tensor [rows, ...], or a tuple, list or dictionary of such, got {embeddings!r}."
        )
    if len({len(leaf) for leaf in leaves}) > 1:
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves)
        raise ValueError(f"embed_rows must return tensors with one entry for each row, got the shapes {shapes}.")
    return leaves, spec


def _counted(embedded: _Embedded) -> Leaves:
    """Its tensors; without rows, if they do not count."""
    return embedded.leaves if embedded.part.share else [leaf[:0] for leaf in embedded.leaves]


def _joined(column: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of all rows, at which a gradient can be taken; in float32 instead of half precision."""
    joined = _at_least_float32(torch.cat(list(column)).detach())
    return joined.requires_grad_(joined.is_floating_point())


def _of_all_ranks(own: Leaves, ranks: Ranks) -> Leaves:
    """The rows of all ranks, those of this one with their gradient."""
    counts = [int(count) for (count,) in ranks.gather(len(own[0]))]
    return [ranks.gather_rows(leaf, counts) for leaf in own]


def _checked(loss: Any) -> torch.Tensor:
    if not isinstance(loss, torch.Tensor) or loss.ndim:
        shape = tuple(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
        raise TypeError(f"loss_of_embeddings must return one number with a gradient, got {shape}.")
    return loss
