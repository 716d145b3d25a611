"""The algorithm without a Trainer: the micro-batches of a linear model together equal the whole batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from hf_mbp.collate import count_cells
from hf_mbp.items import count_items
from hf_mbp.plan import Budget, Cost, as_sizes
from hf_mbp.step import (
    MicroBatch,
    RowFunctions,
    collate_groups,
    run_micro_batches,
    split_mini_batch,
    weigh,
)
from tests.examples import examples
from tests.helpers import Pad

quick = examples(40)

CLASSES, FEATURES = 5, 12


class FakeRanks:
    """Ranks of which the others say, at every call, the same; `said` has a row for each, this one last."""

    def __init__(self, *others: list[float]) -> None:
        self.others = others
        self.count = 1 + len(others)

    def gather(self, *numbers: float) -> list[list[float]]:
        return [*self.others, list(numbers)]

    def highest(self, number: int) -> int:
        return int(max(row[0] for row in self.gather(number)))

    def lowest(self, number: float) -> float:
        return min(row[0] for row in self.gather(number))


ALONE = FakeRanks()


def rows_of(lengths: list[int], *, unlabelled: frozenset[int] = frozenset()) -> list[dict[str, Any]]:
    """Rows of tokens with a label for each, some of them -100; rows in `unlabelled` have none that counts."""
    rows = []
    for index, length in enumerate(lengths):
        token_ids = [(7 * index + 3 * position) % FEATURES for position in range(length)]
        labels = [-100 if index in unlabelled or (index + t) % 4 == 0 else t % CLASSES for t in token_ids]
        rows.append({"input_ids": token_ids, "attention_mask": [1] * length, "labels": labels})
    return rows


FUNCTIONS = RowFunctions(
    collate=lambda groups: [Pad()(group) for group in groups],
    num_items=lambda inputs: count_items(inputs, shifts=False),
    num_cells=lambda inputs: count_cells(inputs, with_targets=False),
)


def split(rows: list[Any], max_tokens: int, *, ranks: Any = ALONE, functions: Any = FUNCTIONS) -> list[MicroBatch]:
    sizes = as_sizes([len(row["input_ids"]) for row in rows])
    budget, cost = Budget(max_tokens=max_tokens), Cost(overhead=8)
    return split_mini_batch(rows, sizes, budget=budget, cost=cost, functions=functions, ranks=ranks)


def micro_batch(items: float, *, name: str = "") -> MicroBatch:
    labels = torch.tensor([[1] * int(items) + [-100]])
    return MicroBatch(inputs={"labels": labels, "name": name}, num_rows=1, num_items=items, cells=4, tokens=3)


class Model(torch.nn.Module):
    """One linear layer over token embeddings; its loss is a mean over labels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(FEATURES, 6, dtype=torch.float64)
        self.linear = torch.nn.Linear(6, CLASSES, dtype=torch.float64)

    def loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        logits = self.linear(self.embedding(inputs["input_ids"]))
        return cross_entropy(logits.flatten(0, 1), inputs["labels"].flatten())

    def backward(self, micro_batch: MicroBatch) -> torch.Tensor:
        loss = self.loss(micro_batch.inputs) * micro_batch.weight
        loss.backward()
        return loss.detach()

    def gradients(self) -> list[torch.Tensor]:
        return [parameter.grad.clone() for parameter in self.parameters()]


def whole(rows: list[Any]) -> tuple[float, list[torch.Tensor]]:
    model = Model()
    loss = model.loss(Pad()(rows))
    loss.backward()
    return float(loss.detach()), model.gradients()


def rows_in(micro_batches: list[MicroBatch]) -> list[list[int]]:
    """Rows without padding, in the order in which they run."""
    return [
        token_ids[mask != 0].tolist()
        for micro_batch in micro_batches
        for token_ids, mask in zip(micro_batch.inputs["input_ids"], micro_batch.inputs["attention_mask"], strict=True)
    ]


# The whole batch, from its parts


@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12), max_tokens=st.integers(1, 60))
@quick
def test_micro_batches_give_loss_and_gradient_of_the_whole_batch(lengths: list[int], max_tokens: int) -> None:
    rows = [*rows_of(lengths, unlabelled=frozenset({1})), *rows_of([5])]
    expected_loss, expected = whole(rows)
    model = Model()
    loss = run_micro_batches(weigh(split(rows, max_tokens), ALONE), model.backward)
    assert float(loss) == pytest.approx(expected_loss, rel=1e-12)
    for gradient, reference in zip(model.gradients(), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)


def test_equal_weights_would_not_give_the_whole_batch() -> None:
    """The reference above tells a share from 1 / micro-batches."""
    rows = rows_of([12, 11, 3, 2, 1])
    micro_batches = weigh(split(rows, 24), ALONE)
    assert len({mb.weight for mb in micro_batches}) > 1
    model = Model()
    loss = sum(float(model.loss(mb.inputs).detach()) for mb in micro_batches) / len(micro_batches)
    assert loss != pytest.approx(whole(rows)[0], rel=1e-3)


def test_ranks_together_give_the_gradient_of_all_rows() -> None:
    """Gradients are averaged over the ranks, as DDP does, fillers included."""
    shards = [rows_of([9, 8, 2, 2]), rows_of([3, 1, 2], unlabelled=frozenset({0})), rows_of([1])]
    _, expected = whole([row for rows in shards for row in rows])
    unweighed = [split(rows, 9) for rows in shards]
    said = [[len(mbs), sum(mb.num_items for mb in mbs)] for mbs in unweighed]
    total = [torch.zeros_like(gradient) for gradient in expected]
    for rank, micro_batches in enumerate(unweighed):
        ranks = FakeRanks(*(said[:rank] + said[rank + 1 :]))
        model = Model()
        run_micro_batches(weigh(micro_batches, ranks), model.backward)
        total = [a + b / len(shards) for a, b in zip(total, model.gradients(), strict=True)]
    for gradient, reference in zip(total, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-10, atol=1e-14)


# split_mini_batch


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), max_tokens=st.integers(1, 120))
@quick
def test_every_row_runs_once_within_the_budget_the_longest_first(lengths: list[int], max_tokens: int) -> None:
    rows = rows_of(lengths)
    micro_batches = split(rows, max_tokens)
    assert sorted(rows_in(micro_batches)) == sorted(row["input_ids"] for row in rows)
    assert all(mb.cells <= max_tokens or mb.num_rows == 1 for mb in micro_batches)
    assert [len(row) for row in rows_in(micro_batches)] == sorted(lengths, reverse=True)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), max_tokens=st.integers(1, 120))
@quick
def test_micro_batches_count_rows_cells_tokens_and_items(lengths: list[int], max_tokens: int) -> None:
    rows = rows_of(lengths)
    micro_batches = split(rows, max_tokens)
    for mb in micro_batches:
        assert mb.num_rows == len(mb.inputs["input_ids"])
        assert mb.cells == mb.inputs["input_ids"].numel()
        assert mb.tokens == int(mb.inputs["attention_mask"].sum())
        assert mb.num_items == int((mb.inputs["labels"] != -100).sum())
    assert sum(mb.tokens for mb in micro_batches) == sum(lengths)


def test_ranks_plan_for_as_many_micro_batches_as_the_one_that_needs_most() -> None:
    rows = rows_of([9, 8, 7, 2])
    assert len(split(rows, 100)) == 1
    assert len(split(rows, 100, ranks=FakeRanks([3.0], [1.0]))) == 3


def test_a_rank_makes_no_more_micro_batches_than_it_has_rows() -> None:
    assert [mb.num_rows for mb in split(rows_of([9, 8]), 100, ranks=FakeRanks([5.0]))] == [1, 1]


# Useful tokens


def counted(inputs: dict[str, Any], sizes: list[Any]) -> tuple[int, int]:
    """Cells and tokens of one group."""
    functions = RowFunctions(
        collate=lambda groups: [inputs], num_items=lambda _: 1, num_cells=lambda x: count_cells(x, with_targets=True)
    )
    (mb,) = collate_groups(sizes, as_sizes(sizes), [list(range(len(sizes)))], Budget(), functions)
    return mb.cells, mb.tokens


def test_padding_that_came_with_the_rows_is_not_useful() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert counted({"input_ids": mask, "attention_mask": mask}, [4, 4]) == (8, 5)


def test_lengths_tell_what_is_useful_where_there_is_no_mask() -> None:
    assert counted({"input_ids": torch.ones(2, 4)}, [4, 1]) == (8, 5)


def test_targets_are_useful_tokens_too() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    inputs = {"input_ids": mask, "attention_mask": mask, "labels": torch.ones(2, 3)}
    assert counted(inputs, [(2, 3), (4, 1)]) == (14, 10)


def test_there_are_no_more_useful_tokens_than_cells() -> None:
    assert counted({"input_ids": torch.ones(1, 4)}, [9]) == (4, 4)


# collate_groups


def wide(width: int) -> RowFunctions:
    """A collator that pads to `width`, whatever the rows."""

    def collate(groups: list[list[Any]]) -> list[dict[str, Any]]:
        filler = rows_of([width])
        return [{key: value[:-1] for key, value in Pad()([*group, *filler]).items()} for group in groups]

    return RowFunctions(collate=collate, num_items=FUNCTIONS.num_items, num_cells=FUNCTIONS.num_cells)


def test_groups_that_are_padded_beyond_the_budget_are_halved() -> None:
    rows = rows_of([6, 5, 4, 3, 2, 1, 1])
    micro_batches = split(rows, 60, functions=wide(20))
    assert [mb.num_rows for mb in micro_batches] == [3, 2, 2]
    assert all(mb.cells == 20 * mb.num_rows <= 60 for mb in micro_batches)
    assert rows_in(micro_batches) == [row["input_ids"] for row in rows]


def test_a_single_row_that_is_padded_beyond_the_budget_runs() -> None:
    micro_batches = split(rows_of([6, 5, 4]), 60, functions=wide(70))
    assert [(mb.num_rows, mb.cells) for mb in micro_batches] == [(1, 70)] * 3


@pytest.mark.parametrize(("cells", "num_micro_batches"), [(29, 1), (30, 2)])
def test_a_group_that_just_fills_the_budget_is_not_halved(cells: int, num_micro_batches: int) -> None:
    """As many cells as a collator that joins the rows may give: no multiple of the rows."""
    functions = RowFunctions(
        collate=FUNCTIONS.collate,
        num_items=FUNCTIONS.num_items,
        num_cells=lambda inputs: cells if len(inputs["labels"]) == 7 else 1,
    )
    groups = collate_groups(rows_of([4] * 7), as_sizes([4] * 7), [list(range(7))], Budget(max_tokens=29), functions)
    assert len(groups) == num_micro_batches


# weigh


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8).filter(any))
@quick
def test_weights_on_one_process_are_shares_and_sum_to_one(items: list[int]) -> None:
    weighed = weigh([micro_batch(count, name=str(index)) for index, count in enumerate(items)], ALONE)
    assert sum(mb.weight for mb in weighed) == pytest.approx(1)
    assert {mb.inputs["name"]: mb.weight for mb in weighed} == {
        str(index): pytest.approx(count / sum(items)) for index, count in enumerate(items)
    }
    assert [mb.is_idle for mb in weighed] == sorted((not count for count in items), reverse=True)


def test_items_need_not_be_integers() -> None:
    assert [mb.weight for mb in weigh([micro_batch(0.5), micro_batch(1.5)], ALONE)] == [0.25, 0.75]


@pytest.mark.parametrize("ranks", [ALONE, FakeRanks([0, 0.0])])
def test_nothing_runs_where_there_are_no_items(ranks: FakeRanks) -> None:
    weighed = weigh([micro_batch(0), micro_batch(0)], ranks)
    assert [(mb.is_idle, mb.weight) for mb in weighed] == [(True, 0.0)] * 2


def test_nothing_runs_without_micro_batches() -> None:
    assert weigh([], ALONE) == []


@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=5), min_size=2, max_size=4).filter(
        lambda x: sum(map(sum, x))
    )
)
@quick
def test_ranks_run_equally_many_and_their_weights_sum_to_the_ranks(items: list[list[int]]) -> None:
    learning = [[count for count in counts if count] for counts in items]
    most, total = max(map(len, learning)), sum(map(sum, items))
    said = [[float(len(counts)), float(sum(counts))] for counts in learning]
    weights = []
    for rank, counts in enumerate(items):
        weighed = weigh([micro_batch(count) for count in counts], FakeRanks(*said[:rank], *said[rank + 1 :]))
        run = [mb for mb in weighed if not mb.is_idle]
        assert len(run) == most
        assert len(weighed) == most + counts.count(0)
        expected = [count / total * len(items) for count in learning[rank]] + [0] * (most - len(learning[rank]))
        assert [mb.weight for mb in run] == pytest.approx(expected)
        weights += [mb.weight for mb in weighed]
    assert sum(weights) == pytest.approx(len(items))


def test_fillers_count_nothing_and_have_an_item() -> None:
    kept = replace(micro_batch(5, name="kept from the step before"), weight=0.5, rows=("a row",))
    own, first, second = weigh([micro_batch(4)], FakeRanks([3, 6.0]), filler=kept)
    assert own.weight == pytest.approx(0.4 * 2)
    for filler in (first, second):
        assert (filler.weight, filler.num_rows, filler.num_items, filler.cells, filler.tokens) == (0, 0, 0, 0, 0)
        assert filler.rows == ()  # by which what is measured of it is left out
        assert filler.inputs["name"] == "kept from the step before"
        assert count_items(filler.inputs, shifts=True) > 0


def test_the_last_micro_batch_fills_if_none_is_given() -> None:
    weighed = weigh([micro_batch(4, name="long"), micro_batch(4, name="short")], FakeRanks([3, 6.0]))
    assert [mb.inputs["name"] for mb in weighed] == ["long", "short", "short"]


def test_one_without_items_is_idle_on_several_ranks_too() -> None:
    """Its loss may be 0/0, and no number times zero is none."""
    unlabelled = MicroBatch(inputs={"labels": torch.full((2, 3), -100)}, num_rows=2, num_items=0, cells=6, tokens=6)
    idle, run, filler = weigh([micro_batch(4, name="own"), unlabelled], FakeRanks([2, 4.0]))
    assert (idle.is_idle, idle.cells, idle.num_rows) == (True, 6, 2)
    assert (run.weight, filler.weight) == (1.0, 0.0)
    assert filler.inputs["name"] == "own"


def test_a_rank_with_no_items_of_its_own_runs_along() -> None:
    idle, filler = weigh([micro_batch(0)], FakeRanks([1, 4.0]))
    assert (idle.is_idle, filler.is_idle, filler.weight) == (True, False, 0)
    assert count_items(filler.inputs, shifts=True) > 0


def test_fillers_whose_loss_is_no_number_are_refused() -> None:
    micro_batches = weigh([micro_batch(0)], FakeRanks([1, 4.0]))
    with pytest.raises(ValueError, match=r"nothing to learn from in this step.*If num_items is overridden"):
        run_micro_batches(micro_batches, lambda _: torch.tensor(float("nan")))


def test_a_loss_that_is_no_number_is_not_taken_for_that_of_a_filler() -> None:
    """What becomes of a mini-batch whose loss overflows is for the trainer, or the scaler of fp16, to say."""
    assert not torch.isfinite(run_micro_batches(weigh([micro_batch(4)], ALONE), lambda _: torch.tensor(float("nan"))))


# run_micro_batches


def recorded_run(count: int, **options: bool) -> tuple[list[str], float]:
    log: list[str] = []

    @contextmanager
    def deferred() -> Iterator[None]:
        log.append("enter")
        yield
        log.append("leave")

    def backward(mb: MicroBatch) -> torch.Tensor:
        log.append(mb.inputs["name"])
        return torch.tensor(2.0 ** int(mb.inputs["name"]))

    micro_batches = [micro_batch(1, name=str(index)) for index in range(count)]
    loss = run_micro_batches(micro_batches, backward, defer_sync=deferred, **options)
    return log, float(loss)


def test_synchronisation_is_deferred_for_all_but_the_last() -> None:
    assert recorded_run(3) == (["enter", "0", "leave", "enter", "1", "leave", "2"], 1 + 2 + 4)


def test_a_single_micro_batch_synchronises() -> None:
    assert recorded_run(1) == (["0"], 1)


def test_synchronisation_is_deferred_for_the_last_too_where_it_is_made_afterwards() -> None:
    assert recorded_run(2, syncs_last=False)[0] == ["enter", "0", "leave", "enter", "1", "leave"]


def test_losses_of_the_parts_are_left_as_they_were() -> None:
    parts = [torch.tensor(1.0), torch.tensor(2.0)]
    remaining = list(parts)
    loss = run_micro_batches([micro_batch(1), micro_batch(1)], lambda _: remaining.pop(0))
    assert (float(loss), float(parts[0]), float(parts[1])) == (3, 1, 2)
