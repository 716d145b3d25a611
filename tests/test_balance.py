"""Rows of a step are dealt to ranks by their cost: a step has the rows it had before, and ranks cost nearly alike."""

from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import chain, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, SequentialSampler
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration
from transformers.trainer_pt_utils import BatchRebalanceSampler

import rank_balance
from hf_mbp import MBPConfig, row_lengths
from hf_mbp.arrays import Ints
from hf_mbp.balance import deal
from hf_mbp.collate import KeepRows
from hf_mbp.loaders import BalancedBatches, DealtRows, EqualBatches, balanced, for_all_ranks, why_not_balanced
from hf_mbp.plan import Cost
from hf_mbp.report import balance_note
from hf_mbp.row_lengths import known_lengths
from marked_table import table_in
from tests.distributed.cases import Stream
from tests.helpers import Pad, bert_config, build, mbp_trainer, token_rows, with_labels

COST = Cost(overhead=1e6, attention=0.01)
"""Micro-batches cost so much that each rank runs one."""

CHEAP = Cost(overhead=1, attention=0.01)
"""Micro-batches cost so little that each rank runs many."""


DEALING = partial(deal, cost=COST, in_lockstep=True)


def uneven(count: int, seed: int = 0) -> Ints:
    return np.clip(np.random.default_rng(seed).lognormal(3, 1, count), 1, 300).astype(np.int64)


def costs_of(lengths: Ints, shares: list[Any]) -> list[float]:
    """What each rank costs, as one padded micro-batch, without the overhead; 0 for one without rows."""
    width = [int(lengths[share].max()) if len(share) else 0 for share in shares]
    return [len(share) * w * (COST.cell + COST.attention * w) for share, w in zip(shares, width, strict=True)]


# Dealing


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_no_other_assignment_of_rows_has_a_smaller_maximum(num_ranks: int) -> None:
    for seed, num_rows in product(range(4), range(num_ranks, 8)):
        lengths = uneven(num_rows, seed)
        assignments = product(range(num_ranks), repeat=num_rows)
        best = min(
            max(costs_of(lengths, [np.flatnonzero(np.array(ranks) == rank) for rank in range(num_ranks)]))
            for ranks in assignments
        )
        dealt = deal(lengths, num_ranks, COST, in_lockstep=True)
        assert sorted(chain.from_iterable(map(list, dealt))) == list(range(num_rows))
        assert max(costs_of(lengths, dealt)) == pytest.approx(best, abs=num_rows)  # costs are rounded to whole numbers


@pytest.mark.parametrize("cost", [COST, CHEAP])
def test_every_rank_has_a_row_where_there_are_enough(cost: Cost) -> None:
    for num_rows, num_ranks in product(range(9), range(1, 8)):
        dealt = deal(np.array([500, *[3] * num_rows])[:num_rows], num_ranks, cost, in_lockstep=True)
        assert len(dealt) == num_ranks
        assert sorted(chain.from_iterable(map(list, dealt))) == list(range(num_rows))
        assert sum(len(rows) > 0 for rows in dealt) == min(num_rows, num_ranks)


def test_empty_rows_fill_a_cell() -> None:
    assert [len(rows) for rows in deal(np.zeros(6, dtype=np.int64), 3, Cost(), in_lockstep=True)] == [2, 2, 2]


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_ranks_that_run_many_micro_batches_have_rows_of_all_lengths(num_ranks: int) -> None:
    lengths = uneven(16 * num_ranks)
    dealt = deal(lengths, num_ranks, CHEAP, in_lockstep=True)
    assert {len(rows) for rows in dealt} == {16}
    in_turns = np.sort(lengths)[::-1].reshape(16, num_ranks)
    for rows in dealt:
        sorted_rows = np.sort(lengths[rows])[::-1]
        assert ((sorted_rows <= in_turns[:, 0]) & (sorted_rows >= in_turns[:, -1])).all()
    tokens = [int(lengths[rows].sum()) for rows in dealt]
    before = lengths.reshape(num_ranks, 16).sum(axis=1)
    assert max(tokens) - min(tokens) <= int(lengths.max())  # what one row makes of it
    assert max(tokens) < before.max()


def test_runs_are_dealt_for_longer_where_ranks_wait_once_a_step() -> None:
    """A row costs as much as five micro-batches by themselves, of which some are the floor."""
    lengths, by_itself = np.full(16, 100), 20.0
    assert not is_in_runs(deal(lengths, 2, Cost(overhead=by_itself), in_lockstep=True))
    assert is_in_runs(deal(lengths, 2, Cost(overhead=by_itself), in_lockstep=False))
    assert is_in_runs(deal(lengths, 2, Cost(overhead=by_itself, floor=2 * by_itself), in_lockstep=True))
    assert not is_in_runs(deal(lengths, 2, Cost(overhead=by_itself / 3), in_lockstep=False))


def is_in_runs(shares: list[Ints]) -> bool:
    """Whether each share of equal rows is without a gap."""
    return all(int(rows[-1] - rows[0]) == len(rows) - 1 for rows in shares)


@pytest.mark.parametrize("num_ranks", [2, 8, 64])
def test_ranks_that_run_one_micro_batch_cost_nearly_alike(num_ranks: int) -> None:
    lengths = uneven(16 * num_ranks)
    before = costs_of(lengths, np.split(np.arange(16 * num_ranks), num_ranks))
    after = costs_of(lengths, deal(lengths, num_ranks, COST, in_lockstep=True))
    costliest_row = max(costs_of(lengths, [[row] for row in range(len(lengths))]))
    assert max(after) < max(1.2 * sum(after) / num_ranks, costliest_row + num_ranks)
    assert max(after) < 0.7 * max(before)
    assert sum(after) < 0.8 * sum(before)  # and less is padding


# Batches


def stock(sampler: Any, ranks: int, **options: bool) -> list[list[list[int]]]:
    """The batches of each rank by Accelerate, the missing ones empty."""
    kind = BatchSamplerShard if options["even_batches"] else EqualBatches
    return [list(kind(sampler, ranks, rank, **options)) for rank in range(ranks)]


def shard_of(sampler: Any, ranks: int, rank: int, lengths: Ints | None, together: int, **options: bool) -> Any:
    shard = BatchSamplerShard(sampler, ranks, rank, **options)
    shard.__class__ = BalancedBatches
    shard.balance(lambda: lengths, DEALING, together)
    return shard


SHAPES = list(product((1, 3, 7, 8, 12, 13, 24, 25, 31), (1, 2, 3), (2, 3, 4)))
"""Rows, rows a batch, ranks."""


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_each_step_has_the_rows_of_stock(split: bool, drop_last: bool, even: bool) -> None:
    options = {"split_batches": split, "even_batches": even}
    num_moved = 0
    for (rows, batch_size, ranks), together in product(SHAPES, (1, 2, 3)):
        total = batch_size * ranks if split else batch_size
        sampler = BatchSampler(SequentialSampler(range(rows)), total, drop_last)
        expected = stock(sampler, ranks, **options)
        shards = [shard_of(sampler, ranks, rank, uneven(rows), together, **options) for rank in range(ranks)]
        ours = [list(shard) for shard in shards]
        unchanged = [list(shard_of(sampler, ranks, rank, None, together, **options)) for rank in range(ranks)]
        assert unchanged == expected
        assert [len(batches) for batches in ours] == [len(batches) for batches in expected]
        assert {len(shard) for shard in shards} == {len(expected[0])}
        for start in range(0, len(expected[0]), together):
            of_stock, of_ours = (
                [list(chain.from_iterable(own[start : start + together])) for own in batches]
                for batches in (expected, ours)
            )
            assert Counter(chain.from_iterable(of_stock)) == Counter(chain.from_iterable(of_ours))
            num_moved += of_stock != of_ours
    assert num_moved > 100


def test_the_sampler_is_read_once_and_random_numbers_are_drawn_as_by_stock() -> None:
    class Read(RandomSampler):
        times = 0

        def __iter__(self) -> Any:
            self.times += 1
            return super().__iter__()

    def state_after(make: Callable[[Any], Any]) -> Any:
        torch.manual_seed(0)
        sampler = Read(range(50))
        shard = make(BatchSampler(sampler, 4, False))
        assert list(shard) != list(shard)
        assert sampler.times == 2
        return torch.get_rng_state()

    ours = state_after(partial(shard_of, ranks=2, rank=1, lengths=uneven(50), together=2, even_batches=True))
    assert torch.equal(ours, state_after(partial(BatchSamplerShard, num_processes=2, process_index=1)))


# Loaders


ROWS = with_labels(token_rows(61), lambda index, row: index)


def loader_of(rank: int | None, dataset: Any = ROWS, *, workers: int = 0, **options: Any) -> Any:
    """A loader of rows as Trainer has it prepared, for one of two ranks; for all in one process, if `None`."""
    loader = DataLoader(
        dataset,
        batch_size=4 if rank is not None else 8,
        shuffle=not isinstance(dataset, torch.utils.data.IterableDataset),
        collate_fn=KeepRows(),
        num_workers=workers,
    )
    processes = {} if rank is None else {"num_processes": 2, "process_index": rank}
    return for_all_ranks(
        prepare_data_loader(loader, **processes, use_seedable_sampler=True, data_seed=3, put_on_device=False, **options)
    )


def read(loader: Any) -> list[list[int]]:
    return [[row["labels"] for row in batch.unpack()] for batch in loader]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("dataset", [ROWS, datasets.Dataset.from_list(ROWS)], ids=["list", "table"])
def test_epochs_have_the_rows_of_stock_and_a_resumed_one_the_rest(workers: int, dataset: Any) -> None:
    two = [balanced(loader_of(rank, dataset, workers=workers), DEALING, 2) for rank in range(2)]
    before = [loader_of(rank, dataset) for rank in range(2)]
    seen = []
    for epoch in range(2):
        for loader in (*two, *before):
            loader.set_epoch(epoch)
        ours, theirs = ([read(loader) for loader in loaders] for loaders in (two, before))
        assert len(ours[0]) == len(theirs[0]) == len(two[0])
        for start in range(0, len(ours[0]), 2):
            a, b = (Counter(chain(*chain(*(own[start : start + 2] for own in read)))) for read in (ours, theirs))
            assert a == b
        assert [len(batch) for batch in ours[0]] != [len(batch) for batch in theirs[0]]
        seen.append(ours)
    assert seen[0] != seen[1]
    for rank, loader in enumerate(two):
        resumed = skip_first_batches(loader, 4)
        resumed.set_epoch(1)
        two[rank].set_epoch(1)
        assert read(resumed) == read(two[rank])[4:]


def test_rows_that_cannot_be_dealt_are_left_as_they_were_with_the_reason() -> None:
    stream = loader_of(0, Stream(ROWS))
    table = datasets.Dataset.from_list(ROWS)
    lazy, texts = table.with_transform(lambda batch: batch), [{"text": "a b c"}] * 61
    own = loader_of(0)
    own.base_dataloader.collate_fn = Pad()
    rebalanced = loader_of(0)
    sampler = BatchRebalanceSampler([3] * 61, effective_batch_size=8, dp_size=2, grad_accum=1)
    rebalanced.batch_sampler.batch_sampler = sampler
    reasons = {
        "the training data is a stream": stream,
        "their lengths are only known when they are read": loader_of(0, lazy),
        "the data loader is not that of Trainer": own,
        "BatchRebalanceSampler has chosen which of them belong together": rebalanced,
    }
    for reason, loader in reasons.items():
        assert why_not_balanced(loader) == reason
        assert f"because {reason}: a process with longer rows" in balance_note(2, reason)
    assert why_not_balanced(loader_of(0, texts)) == "their lengths are only known when they are read"
    dealt_by_the_first = SimpleNamespace(dataset=DealtRows(SimpleNamespace()))
    assert why_not_balanced(dealt_by_the_first) == "the first process reads and deals them"
    assert why_not_balanced([1, 2]) == "the data loader is not that of Trainer"
    assert why_not_balanced(loader_of(0)) is None
    assert why_not_balanced(balanced(loader_of(0), DEALING, 1)) is None
    assert why_not_balanced(loader_of(0, even_batches=False)) is None


def test_lengths_are_looked_up_once_for_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_up = []

    def counted(dataset: Any, **options: Any) -> Any:
        looked_up.append(len(dataset))
        return known_lengths(dataset, **options)

    monkeypatch.setattr(row_lengths, "known_lengths", counted)
    rows = list(ROWS)
    loader = balanced(loader_of(0, rows), DEALING, 1)
    assert read(loader) != read(loader)  # another epoch
    assert looked_up == [61]
    rows.append(rows[0])
    read(loader)
    assert looked_up == [61, 62]


def test_targets_count_where_they_are_padded_by_themselves() -> None:
    """Sources are alike; one target in four is long."""
    rows = [{"input_ids": [5] * 10, "labels": [index] * (1 if index % 4 else 90)} for index in range(64)]
    for dataset in (rows, datasets.Dataset.from_list(rows)):
        shares = {
            has_targets: [
                [
                    len(batch.unpack())
                    for batch in balanced(loader_of(rank, dataset), DEALING, 1, has_targets=has_targets)
                ]
                for rank in range(2)
            ]
            for has_targets in (False, True)
        }
        assert shares[False] == [[4] * 8] * 2
        assert sum(shares[True][0]) < 24


# The trainer


@pytest.fixture
def trainer(tmp_path: Path) -> Callable[..., Any]:
    """A trainer that takes itself for one of two ranks."""

    def make(**changes: Any) -> Any:
        model = build(BertForSequenceClassification, bert_config(num_labels=len(ROWS)))
        made = mbp_trainer(model, ROWS, tmp_path, **changes)
        made.mbp_feed.ranks = SimpleNamespace(count=2)
        return made

    return make


def test_rows_of_all_accumulated_batches_are_dealt_together(trainer: Callable[..., Any]) -> None:
    shard = trainer(gradient_accumulation_steps=3).mbp_feed.balanced(loader_of(1)).batch_sampler
    assert type(shard) is BalancedBatches
    assert shard.batches_dealt == 3
    assert shard.lengths().tolist() == [len(row["input_ids"]) for row in ROWS]


@pytest.mark.parametrize(("trainer_of", "in_lockstep"), [("Trainer", False), ("user", True), ("FSDP", True)])
def test_who_waits_after_each_micro_batch_is_known(
    trainer_of: str, in_lockstep: bool, trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loss of the user's own may have collectives in it."""
    made = trainer()
    if trainer_of == "user":
        made.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    made.is_fsdp_enabled = trainer_of == "FSDP"
    dealing = made.mbp_feed.balanced(loader_of(1)).batch_sampler.deal
    assert dealing.func is deal
    assert dealing.keywords["in_lockstep"] is in_lockstep
    assert dealing.keywords["cost"].attention > 0


def test_targets_of_an_encoder_decoder_are_dealt_too(tmp_path: Path) -> None:
    rows = [{"input_ids": [5] * (3 + index), "labels": [6] * (2 * index % 7)} for index in range(30)]
    sizes = {"d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "vocab_size": 50}
    made = mbp_trainer(build(T5ForConditionalGeneration, T5Config(**sizes)), rows, tmp_path)
    made.mbp_feed.ranks = SimpleNamespace(count=2)
    shard = made.mbp_feed.balanced(loader_of(1, rows)).batch_sampler
    assert shard.lengths().tolist() == [3 + index + 2 * index % 7 for index in range(30)]


@pytest.mark.parametrize("is_balanced", [False, True])
def test_a_rank_with_too_few_rows_is_checked_on_rows_of_the_data(
    trainer: Callable[..., Any], is_balanced: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    made = trainer(per_device_train_batch_size=1, max_steps=1)
    made.mbp_feed.ranks = made._ranks
    made.mbp_feed._is_balanced = is_balanced
    before = torch.get_rng_state()
    pool = made.mbp_feed._enough_to_check(made.mbp_feed._pooling.pool([[ROWS[3]]]))
    assert torch.equal(torch.get_rng_state(), before)
    assert [row["labels"] for row in pool.rows] == ([3, *range(8)] if is_balanced else [3])
    assert pool.sizes[:, 0].tolist() == [len(row["input_ids"]) for row in pool.rows]
    made.train()
    assert ("Checked to be exact" in capsys.readouterr().out) == is_balanced


def test_batches_that_workers_pad_are_dealt_one_by_one(trainer: Callable[..., Any]) -> None:
    made = trainer(gradient_accumulation_steps=3, collate_in="workers")
    assert made.mbp_feed.balanced(loader_of(1)).batch_sampler.batches_dealt == 1


def test_it_can_be_switched_off(trainer: Callable[..., Any]) -> None:
    shard = trainer(balance_ranks=False).mbp_feed.balanced(loader_of(1)).batch_sampler
    assert type(shard) is BatchSamplerShard


def test_one_process_has_nothing_to_deal(tmp_path: Path) -> None:
    made = mbp_trainer(build(BertForSequenceClassification, bert_config()), ROWS, tmp_path)
    assert type(made.get_train_dataloader().batch_sampler) is BatchSampler


@pytest.mark.parametrize("value", [1, "yes", None])
def test_the_option_is_true_or_false(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"balance_ranks={value!r} is neither True nor False\. Write one\."):
        MBPConfig(balance_ranks=value)
    assert MBPConfig().balance_ranks


# The simulation


def test_the_simulation_knows_who_waits() -> None:
    cost = Cost(overhead=1000, attention=0.0)
    lengths = [np.array([100, 100]), np.array([10, 10])]
    one = rank_balance.waiting(lengths, cost)
    assert (one.after_each, one.once, one.ideal) == (1200, 1200, (1200 + 1020) / 2)
    # Two of the first rank's rows fit at once, so the second one, which needs one micro-batch, runs a filler.
    two = rank_balance.waiting([np.array([100, 100, 100]), np.array([10])], cost, max_tokens=200)
    assert (two.after_each, two.once, two.ideal) == (2300, 2300, (2300 + 1010 + 1016) / 2)


def test_the_simulation_compares_the_same_rows() -> None:
    before, after = rank_balance.compared(2, rank_balance.cost_on("cuda"), in_lockstep=False, num_steps=3)
    assert after.once <= before.once
    assert after.once / after.ideal < before.once / before.ideal
    assert rank_balance.line("cpu", 2, num_steps=1).startswith("| CPU | 2 | ")


def test_the_simulation_shows_from_where_on_turns_are_better() -> None:
    few, many = (rank_balance.runs_over_turns(times, 16, 8, num_steps=4) for times in (5, 50))
    assert few[0] < 0.9 < 1.05 < many[0]  # after each micro-batch
    assert few[1] < many[1] < 1  # once a step
    line = rank_balance.many_line(5, num_steps=1)
    assert len(line.split(" | ")[1].split()) == len(rank_balance.MANY_SHAPES)


def test_the_page_has_the_table() -> None:
    lines = table_in(rank_balance.PAGE, "balance").splitlines()
    assert lines[:2] == rank_balance.HEADER.splitlines()
    assert len(lines) == 2 + len(rank_balance.DEVICES) * len(rank_balance.RANKS)
