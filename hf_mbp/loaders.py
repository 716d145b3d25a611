"""The training data loader: its batches are rows that are not padded yet, and all ranks have equally many of them."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain, cycle, islice
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import broadcast_object_list
from torch.utils.data import BatchSampler

from hf_mbp.arrays import Ints
from hf_mbp.balance import Dealing
from hf_mbp.collate import KeepRows, Rows
from hf_mbp.compat import replaced
from hf_mbp.precollated import CollateInWorkers
from hf_mbp.row_lengths import KnownLengths, may_be_known


@contextmanager
def deferred_collation(trainer: Any, collator: KeepRows) -> Iterator[None]:
    """Lets `get_train_dataloader` build its loader with another collator.

    `Trainer._get_dataloader` reads `data_collator` and wraps it to remove unused columns. For iterable data sets
    Accelerate would build a dispatcher, which concatenates tensors; one process does not need it.
    """
    config = trainer.accelerator.dataloader_config
    is_alone = trainer.accelerator.num_processes == 1
    if not is_alone and isinstance(collator, CollateInWorkers) and _is_dispatched(config, trainer.train_dataset):
        raise ValueError(
            "Data that the first process reads for all is dealt out before it is padded, but here the workers are to "
            "pad it. Set collate_in='main' (not possible for sentence-transformers), or let every process read its "
            "own share: accelerator_config={'dispatch_batches': False}."
        )
    dispatches = False if is_alone else config.dispatch_batches
    with replaced(trainer, data_collator=collator), replaced(config, dispatch_batches=dispatches):
        yield


def _is_dispatched(config: Any, dataset: Any) -> bool:
    if config.dispatch_batches is not None:
        return bool(config.dispatch_batches)
    return isinstance(dataset, torch.utils.data.IterableDataset)


def for_all_ranks(loader: Any) -> Any:
    """A loader of rows that Accelerate has prepared, mended so that every rank gets as many batches as the others."""
    if isinstance(loader, DataLoaderDispatcher) and _keeps_rows(loader):
        return DataLoaderShard(DealtRows(loader), batch_size=None)
    shard: Any = getattr(loader, "batch_sampler", None)
    if type(shard) is BatchSamplerShard and not shard.even_batches and _keeps_rows(loader):
        shard.__class__ = EqualBatches  # a DataLoader does not let its sampler be exchanged
    return loader


def _keeps_rows(loader: Any) -> bool:
    """Whether batches of a loader are rows; the collator may be wrapped, to remove columns."""
    collator = loader.collate_fn
    while not isinstance(collator, KeepRows) and hasattr(collator, "data_collator"):
        collator = collator.data_collator
    return isinstance(collator, KeepRows)


def source_of(loader: Any) -> Any:
    """The loader that reads the data set, where another one deals its rows; the user's own may have no data set."""
    dataset = getattr(loader, "dataset", None)
    return dataset.source if isinstance(dataset, DealtRows) else loader


class EqualBatches(BatchSamplerShard):
    """Batches of indices for one rank, the missing ones empty, so that all ranks have as many.

    Without `even_batches` the ranks that come last in the last round have a batch less, also by `len`, and would stop
    a step before the others.
    """

    def __len__(self) -> int:
        first = copy.copy(self)
        first.process_index = 0
        return int(BatchSamplerShard.__len__(first))

    def __iter__(self) -> Iterator[list[int]]:
        missing = len(self)
        for batch in super().__iter__():
            missing -= 1
            yield batch
        yield from ([] for _ in range(missing))


class BalancedBatches(EqualBatches):
    """Batches of indices for one rank, of the rows that all ranks read for a step, dealt by `deal`.

    The rows of a step on all ranks together are those of Accelerate, and read from the sampler once, as there. Every
    rank deals them by itself, all in the same way; a rank has as many batches a step as before, of other sizes.
    """

    def balance(self, lengths: Callable[[], Ints | None], deal: Dealing, batches_dealt: int) -> None:
        """What to deal by: the lengths of all rows of the data, asked for when an epoch begins; if they are `None`,
        batches stay as they were. So many batches of each rank are dealt together."""
        self.lengths, self.deal, self.batches_dealt = lengths, deal, batches_dealt

    def __iter__(self) -> Iterator[list[int]]:
        lengths, rounds = self.lengths(), self._rounds()
        while step := list(islice(rounds, self.batches_dealt)):
            yield from self._as_they_are(step) if lengths is None else self._dealt(step, lengths)

    def _as_they_are(self, step: list[list[list[int]]]) -> list[list[int]]:
        return [batches[self.process_index] for batches in step]

    def _dealt(self, step: list[list[list[int]]], lengths: Ints) -> list[list[int]]:
        """As many batches for this rank, of the rows of all ranks."""
        rows = [row for batches in step for batch in batches for row in batch]
        own = self.deal(lengths[np.array(rows, dtype=np.int64)], self.num_processes)[self.process_index]
        return [[rows[index] for index in part] for part in np.array_split(own, len(step))]

    def _rounds(self) -> Iterator[list[list[int]]]:
        """One batch of each rank, as Accelerate deals them, an empty one where it has none."""
        batches = iter(self.batch_sampler)
        first: list[list[int]] = []
        while together := list(islice(batches, 1 if self.split_batches else self.num_processes)):
            if self._is_whole(together):
                yield self._cut(together[0]) if self.split_batches else together
                first = first or together
            elif any(last := [self._last(first, together, rank) for rank in range(self.num_processes)]):
                yield last

    def _is_whole(self, together: list[list[int]]) -> bool:
        is_full = bool(len(together[-1]) == self.batch_size)
        return is_full and (self.split_batches or len(together) == self.num_processes)

    def _cut(self, batch: list[int]) -> list[list[int]]:
        size = len(batch) // self.num_processes
        return [batch[rank * size : (rank + 1) * size] for rank in range(self.num_processes)]

    def _last(self, first: list[list[int]], last: list[list[int]], rank: int) -> list[int]:
        """What Accelerate gives a rank of a last round that is not whole, and may be completed from the first one."""
        few = Listed([*first, *last], self.batch_size, self.drop_last)
        shard = BatchSamplerShard(few, self.num_processes, rank, self.split_batches, self.even_batches)
        return next(islice(shard, 1 if first else 0, None), [])


class Listed(BatchSampler):
    """A batch sampler of few batches that are known."""

    def __init__(self, batches: list[list[int]], batch_size: int, drop_last: bool) -> None:
        self.batches, self.batch_size, self.drop_last = batches, batch_size, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self.batches)  # copies: Accelerate adds to them

    def __len__(self) -> int:
        return len(self.batches)


def why_not_balanced(loader: Any) -> str | None:
    """Why the rows of a loader cannot be dealt to ranks by their cost; `None` if they can."""
    shard: Any = getattr(loader, "batch_sampler", None)
    dataset = getattr(loader, "dataset", None)
    if isinstance(dataset, DealtRows):
        return "the first process reads and deals them"
    if isinstance(dataset, torch.utils.data.IterableDataset):
        return "the training data is a stream"
    if type(shard) not in (BatchSamplerShard, EqualBatches, BalancedBatches) or not _keeps_rows(loader):
        return "the data loader is not that of Trainer"
    if type(shard.batch_sampler) is not BatchSampler:
        return f"{type(shard.batch_sampler).__name__} has chosen which of them belong together"
    if not may_be_known(dataset):
        return "their lengths are only known when they are read"
    return None


def balanced(loader: Any, deal: Dealing, batches_dealt: int, *, has_targets: bool = False) -> Any:
    """The loader, with its rows dealt to ranks by their cost; one for which `why_not_balanced` knows no reason.

    Targets, if the model has a part for them that is padded by itself, count as much as sources.
    """
    shard: Any = loader.batch_sampler
    shard.__class__ = BalancedBatches
    shard.balance(KnownLengths(loader.dataset, has_targets=has_targets), deal, batches_dealt)
    return loader


class DealtRows(torch.utils.data.IterableDataset[Rows]):
    """Rows that the first rank reads and deals to all, by the rule of Accelerate's dispatcher.

    The dispatcher concatenates one batch a rank and cuts the result into equal parts; the last rows are completed by
    the first ones. It wants padded tensors; here the rows travel as they are.
    """

    def __init__(self, source: DataLoaderDispatcher) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """For data that is shuffled anew in every epoch."""
        self.source.set_epoch(epoch)

    def __iter__(self) -> Iterator[Rows]:
        ranks, rank = self.source.state.num_processes, self.source.state.process_index
        reader = iter(self.source.base_dataloader) if rank == 0 else iter(())
        first: list[Any] = []
        while rows := _told_by_the_first(self._read(reader, ranks)):
            first = first or rows[:ranks]
            size = -(-len(rows) // ranks)
            completed = islice(chain(rows, cycle(first)), rank * size, (rank + 1) * size)
            yield Rows(list(completed))

    def _read(self, reader: Iterator[Rows], ranks: int) -> list[Any]:
        batches = list(islice(reader, 1 if self.source.split_batches else ranks))
        if self.source._drop_last and not self.source.split_batches and len(batches) < ranks:
            return []
        return list(chain.from_iterable(batch.unpack() for batch in batches))


def _told_by_the_first(rows: list[Any]) -> list[Any]:
    """What the first rank has, on all of them."""
    told = [rows]
    broadcast_object_list(told)
    return told[0]
