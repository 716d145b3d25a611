"""Loaders of rows: every rank gets as many batches as the others, and the rows that Accelerate would give it."""

from collections.abc import Iterator
from functools import partial
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler, SequentialSampler

from hf_mbp import loaders
from hf_mbp.collate import KeepRows, Rows
from hf_mbp.loaders import DealtRows, EqualBatches, deferred_collation
from hf_mbp.precollated import CollateInWorkers
from tests.helpers import Pad

SHAPES = list(product(range(1, 20), (1, 2, 3, 4), (2, 3, 4)))
"""Rows, rows a batch, ranks."""


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split_batches", [False, True])
def test_equal_batches_are_those_of_accelerate_and_empty_ones(split_batches: bool, drop_last: bool) -> None:
    seen_empty = False
    for rows, batch_size, ranks in SHAPES:
        total = batch_size * ranks if split_batches else batch_size
        sampler = BatchSampler(SequentialSampler(range(rows)), total, drop_last)
        options = {"num_processes": ranks, "split_batches": split_batches, "even_batches": False}
        ours = [list(EqualBatches(sampler, process_index=rank, **options)) for rank in range(ranks)]
        theirs = [list(BatchSamplerShard(sampler, process_index=rank, **options)) for rank in range(ranks)]
        assert [[batch for batch in batches if batch] for batches in ours] == theirs
        assert {len(batches) for batches in ours} == {len(EqualBatches(sampler, process_index=ranks - 1, **options))}
        seen_empty |= any(not batch for batches in ours for batch in batches)
    assert seen_empty is not drop_last


class Source:
    """What a dispatcher tells about itself, on one of several ranks."""

    def __init__(self, rows: int, batch_size: int, ranks: int, rank: int, *, split: bool, drop_last: bool) -> None:
        starts = range(0, rows - (rows % batch_size if drop_last else 0), batch_size)
        self.base_dataloader = [Rows(list(range(start, min(rows, start + batch_size)))) for start in starts]
        self.state = SimpleNamespace(num_processes=ranks, process_index=rank)
        self.split_batches, self._drop_last = split, drop_last


def dealt(monkeypatch: pytest.MonkeyPatch, *shape: Any, ranks: int, **options: bool) -> list[list[list[int]]]:
    """The rows of each batch of each rank; what the first one tells the others is put down and read out again."""
    told: list[list[int]] = []

    def put_down(rows: list[int]) -> list[int]:
        told.append(rows)
        return rows

    batches = []
    for rank in range(ranks):
        telling = iter(told)
        monkeypatch.setattr(loaders, "_told_by_the_first", partial(_read_out, telling) if rank else put_down)
        batches.append([rows.unpack() for rows in DealtRows(Source(*shape, ranks, rank, **options))])
    return batches


def _read_out(telling: Iterator[list[int]], _: list[int]) -> list[int]:
    return next(telling)


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_all_rows_are_dealt_once_but_for_the_completion_of_the_last(
    split: bool, drop_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rows, batch_size, ranks in SHAPES:
        total = batch_size * ranks if split else batch_size
        batches = dealt(monkeypatch, rows, total, ranks=ranks, split=split, drop_last=drop_last)
        assert len({len(own) for own in batches}) == 1
        together = [list(chain.from_iterable(own)) for own in zip(*batches, strict=True)]
        assert all(len({len(own) for own in step}) == 1 and step[0] for step in zip(*batches, strict=True))
        read = list(chain.from_iterable(together))
        kept = rows - rows % (batch_size * ranks) if drop_last else rows
        assert read[:kept] == list(range(kept))
        assert len(read) - kept < ranks
        assert all(row in range(ranks) for row in read[kept:])


def test_data_that_workers_pad_cannot_be_dealt() -> None:
    config = SimpleNamespace(dispatch_batches=True)
    accelerator = SimpleNamespace(dataloader_config=config, num_processes=2)
    trainer = SimpleNamespace(accelerator=accelerator, train_dataset=[], data_collator=Pad())
    with (
        pytest.raises(ValueError, match=r"Set collate_in='main'.*accelerator_config=\{'dispatch_batches': False\}"),
        deferred_collation(trainer, CollateInWorkers(Pad())),
    ):
        pass
    with deferred_collation(trainer, KeepRows(Pad())):
        assert isinstance(trainer.data_collator, KeepRows)


def test_a_loader_of_the_users_own_is_left_alone(tmp_path: Path) -> None:
    shard = BatchSamplerShard(BatchSampler(SequentialSampler(range(9)), 2, False), 2, 1, even_batches=False)
    own = SimpleNamespace(batch_sampler=shard, collate_fn=Pad())
    assert loaders.for_all_ranks(own) is own
    assert type(shard) is BatchSamplerShard
    rows = SimpleNamespace(batch_sampler=shard, collate_fn=SimpleNamespace(data_collator=KeepRows()))
    assert loaders.for_all_ranks(rows) is rows
    assert type(shard) is EqualBatches
