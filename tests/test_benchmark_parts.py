"""What the benchmark is made of: rows of every workload, the loss at the end, TRL's packing, FLOPs and phases."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.contestants import CONTESTANTS
from benchmarks.flops import model_flops, peak_flops
from benchmarks.learned import loss_over
from benchmarks.lengths import LENGTHS
from benchmarks.measure import Counts, Order, measure
from benchmarks.page import columns_of
from benchmarks.phases import Ran, fit, of_plans, phases_of
from benchmarks.plain import unpadded
from benchmarks.rows import pad, rows_to_classify, rows_to_continue
from benchmarks.sizes import SIZES
from benchmarks.workloads import WORKLOADS, Shape
from hf_mbp import plan_micro_batches
from hf_mbp.plan import Cost, as_sizes


def an_order(contestant: str, **changes: Any) -> Order:
    place = {"workload": "tiny_lm", "size": "tiny", "shape": "2x4", "contestant": contestant, "repetition": 0}
    limits = {"steps": 3, "device": "cpu", "dtype": "float32", "max_tokens": 64, "headroom_bytes": 2**30}
    return Order(**{**place, **limits, **changes})


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS.keys())
def test_every_workload_has_rows_for_whole_steps(workload: Any) -> None:
    size = SIZES[workload.size]
    rows = workload.rows(size)
    assert [len(row["input_ids"]) for row in rows] == workload.lengths()
    assert rows == workload.rows(size)
    assert max(max(row["input_ids"]) for row in rows) < size.vocabulary
    assert all("labels" in row for row in rows) is not workload.is_language_model
    assert all(len(rows) % Shape.parse(shape).rows_per_step == 0 for shape in workload.shapes)


def test_the_goal_post_has_the_same_micro_batches_with_nothing_to_pad() -> None:
    workload, size = WORKLOADS["tiny"], SIZES["tiny"]
    rows = workload.rows(size)[:8]
    parts = unpadded(rows, size.model(is_language_model=False), "cpu")
    planned = plan_micro_batches([len(row["input_ids"]) for row in rows], 10**9, num_micro_batches=len(parts))
    assert sorted(map(len, parts)) == sorted(map(len, planned))
    assert all(len({len(row["input_ids"]) for row in part}) == 1 for part in parts)
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert sum(len(row["input_ids"]) for part in parts for row in part) == pytest.approx(tokens, abs=len(rows))
    assert sum(row["labels"] for part in parts for row in part) == sum(row["labels"] for row in rows)


def test_lengths_are_those_that_are_told() -> None:
    kept = json.loads(LENGTHS.read_text())
    assert re.search(r"of the 6,859 functions .* of Python 3\.11", kept["functions"]["of"])
    assert len(kept["brown"]["lengths"]) == 500
    brown = WORKLOADS["brown"].lengths()
    assert np.std(kept["brown"]["lengths"]) / np.mean(kept["brown"]["lengths"]) == pytest.approx(0.036, abs=5e-4)
    assert 0.02 < np.std(brown) / np.mean(brown) < 0.05
    assert max(WORKLOADS["functions"].lengths()) == 512


def test_language_models_learn_their_tokens() -> None:
    inputs = pad(WORKLOADS["jargon"].rows(SIZES["tiny"])[:4])
    real = inputs["attention_mask"] == 1
    assert inputs["labels"][real].equal(inputs["input_ids"][real])
    assert (inputs["labels"][~real] == -100).all()
    assert not real.all()


def test_the_models_have_the_sizes_of_their_namesakes() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in SIZES[name].model(is_language_model=True).parameters())
            for name in ("smollm2", "llama1b")
        }
    assert counts == {"smollm2": 134_515_008, "llama1b": 1_235_814_400}


@pytest.mark.parametrize(("make", "is_language_model"), [(rows_to_classify, False), (rows_to_continue, True)])
def test_something_can_be_learned_and_the_loss_shows_it(make: Any, is_language_model: bool) -> None:
    torch.manual_seed(0)
    rows = make([3, 9, 4, 12, 20, 7, 5, 11] * 16, 100)
    seen, unseen = rows[:64], rows[64:]  # what is only remembered does not help with the latter
    model = SIZES["tiny"].model(is_language_model=is_language_model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    before = loss_over(model, unseen)
    model.train()
    for _ in range(40):
        model(**pad(seen)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss_over(model, unseen) < 0.9 * before
    untrained = WORKLOADS["tiny_lm" if is_language_model else "tiny"].untrained_loss(SIZES["tiny"])
    assert before == pytest.approx(untrained, rel=0.1)


def test_the_loss_is_the_mean_over_all_items() -> None:
    torch.manual_seed(0)
    rows = WORKLOADS["tiny_lm"].rows(SIZES["tiny"])
    model = SIZES["tiny"].model(is_language_model=True).eval()
    losses = []
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none"))
    assert loss_over(model, rows) == pytest.approx(float(torch.cat(losses).mean().detach()), rel=1e-5)


@pytest.mark.parametrize("contestant", ["mbp", "trl_packing", "trl_padding_free"])
def test_what_is_in_one_row_counts_as_it_does_apart(contestant: str, tmp_path: Path) -> None:
    if not CONTESTANTS[contestant].is_installed:
        pytest.skip("TRL is not installed")
    lengths = WORKLOADS["tiny_lm"].lengths()
    measured = measure(an_order(contestant), str(tmp_path))
    assert not measured.error
    assert measured.tokens == sum(lengths)
    assert (measured.cells == measured.tokens) is contestant.startswith("trl")
    model = SIZES["tiny"].model(is_language_model=True)
    assert measured.flops == model_flops(model, sum(lengths), sum(length**2 for length in lengths))
    assert 0 < measured.loss < WORKLOADS["tiny_lm"].untrained_loss(SIZES["tiny"])


def test_rows_in_one_row_are_counted_by_their_positions() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 1]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])
    packed, padded = Counts.of({"position_ids": positions}), Counts.of({"attention_mask": mask})
    assert (int(packed.tokens), int(packed.pairs), packed.cells) == (6, 9 + 1 + 4, 6)
    assert (int(padded.tokens), int(padded.pairs), padded.cells) == (6, 9 + 1 + 4, 9)


@pytest.mark.parametrize("is_language_model", [False, True])
def test_flops_are_those_of_the_matrices(is_language_model: bool) -> None:
    """Counted by torch in a forward pass without attention; backward takes twice as many."""
    from torch.utils.flop_counter import FlopCounterMode

    model = SIZES["tiny"].model(is_language_model=is_language_model)
    ids = torch.full((1, 16), 7)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    counts = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    matrices = sum(count for name, count in counts.items() if "attention" not in name and "bmm" not in name)
    # A classifier multiplies the pooled token alone with its last matrices; biases and norms count here.
    assert model_flops(model, 16, 0) == pytest.approx(3 * matrices, rel=0.01 if is_language_model else 0.15)


def test_a_gpu_has_two_columns_more() -> None:
    known = {"device_bytes": 80 * 10**9, "peak_flops": peak_flops("NVIDIA H100 80GB HBM3", "bfloat16")}
    more = {column.title: column for column in columns_of(known)}
    fewer = [column.title for column in columns_of({"device_bytes": None, "peak_flops": None})]
    assert [title for title in more if title not in fewer] == ["FLOPs used", "of the GPU's"]
    values = {"flops_per_second": 98.9e12, "held_bytes": 40e9}
    entry = {name: dict.fromkeys(("median", "min", "max"), value) for name, value in values.items()}
    assert (more["FLOPs used"].cell(entry), more["of the GPU's"].cell(entry)) == ("10.0%", "50%")
    assert peak_flops("NVIDIA H100 80GB HBM3", "float32") is None


def test_mixed_precision_trains(tmp_path: Path) -> None:
    for contestant in ("mbp", "limit"):
        measured = measure(an_order(contestant, dtype="bfloat16"), str(tmp_path))
        assert not measured.error
        assert measured.loss < WORKLOADS["tiny_lm"].untrained_loss(SIZES["tiny"])


def test_the_costs_are_found_from_times() -> None:
    ran = [
        Ran(rows=rows, width=width, seconds=1e-3 * (5 + 0.1 * rows * width + 0.0002 * rows * width**2))
        for rows in (1, 3, 8)
        for width in (10, 40, 160)
    ]
    cost, cell_seconds, error = fit(ran)
    assert (cost.overhead, cost.attention, cell_seconds) == pytest.approx((50, 0.002, 1e-4))
    assert error < 1e-9
    assert fit([Ran(rows=r, width=w, seconds=r * w - 0.5) for r in (1, 2) for w in (4, 9)])[0].overhead == 0


def test_what_a_plan_takes_adds_up() -> None:
    steps = [as_sizes([4, 4, 10])]
    cheap, dear = Cost(overhead=0.0, attention=0.1), Cost(overhead=1000.0)
    apart, together = of_plans(steps, cheap, cheap), of_plans(steps, dear, cheap)
    assert apart == pytest.approx({"overheads": 0, "tokens": 18, "their pairs": 13.2, "padding": 0, "in all": 31.2})
    assert together["in all"] == pytest.approx(3 * 10 + 0.1 * 3 * 100)
    assert together["padding"] == pytest.approx(60 - 31.2)


def test_phases_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Ran] = []
    monkeypatch.setattr("benchmarks.phases.costs", lambda task, planned, ran: seen.extend(ran) or "costs")
    told = phases_of(an_order("mbp", workload="tiny"), str(tmp_path))
    assert "forward and backward of 1.0 micro-batches" in told
    assert [one.rows for one in seen] == [8, 8, 8]
    shares = [float(share) for share in re.findall(r"([\d.]+)%", told)]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(100, abs=0.2)


def test_mbp_pytorch_always_has_something_to_split(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one part it runs no backward pass."""
    sizes: list[int] = []

    def apply(names: list[str], ub_size: int, device: str) -> Any:
        sizes.append(ub_size)
        return lambda function: function

    monkeypatch.setitem(__import__("sys").modules, "mbp", SimpleNamespace(apply=apply))
    stopwatch = SimpleNamespace(start=lambda: None, stop=lambda: None)
    task = an_order("mbp_pytorch").task("")
    CONTESTANTS["mbp_pytorch"].train(task, task.model(), stopwatch)
    assert sizes == [4]
