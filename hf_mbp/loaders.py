"""The training data loader: its batches are rows that are not padded yet, and all ranks have equally many of them."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, cycle, islice
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import broadcast_object_list

from hf_mbp.collate import KeepRows, Rows
from hf_mbp.compat import replaced
from hf_mbp.precollated import CollateInWorkers


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
    """The loader that reads the data set, where another one deals its rows."""
    return loader.dataset.source if isinstance(loader.dataset, DealtRows) else loader


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
