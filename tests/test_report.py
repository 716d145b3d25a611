"""Logged numbers are sums over steps and ranks, checked by hand on small steps."""

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMaskedLM, BertForSequenceClassification

from hf_mbp import report
from hf_mbp.plan import as_sizes
from hf_mbp.report import Counts, StepReport, padded_rows_note, start_line
from hf_mbp.step import MicroBatch
from tests.helpers import Pad, Recorder, bert_config, build, masked_prefix, mbp_trainer, token_rows, with_labels


class FakeRanks:
    """This rank and others that say what `change` makes of its numbers."""

    def __init__(self, *changes: Any) -> None:
        self.changes = changes
        self.count = 1 + len(changes)

    def gather(self, *numbers: float) -> list[list[float]]:
        return [list(numbers), *([change(number) for number in numbers] for change in self.changes)]


ALONE = FakeRanks()


def micro_batch(cells: int, tokens: int) -> MicroBatch:
    return MicroBatch(inputs={}, num_rows=1, num_items=1, cells=cells, tokens=tokens)


def step_of(*shapes: tuple[int, int]) -> list[MicroBatch]:
    return [micro_batch(cells, tokens) for cells, tokens in shapes]


def run(steps: StepReport, shapes: list[tuple[int, int]], batches: list[Any], max_tokens: int = 64) -> None:
    """Plans a step, and runs it."""
    steps.plan_step(step_of(*shapes), [as_sizes(sizes) for sizes in batches], max_tokens)
    steps.count_step()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock whose hand is the first element."""
    hand = [0.0]
    monkeypatch.setattr(report.time, "perf_counter", lambda: hand[0])
    return hand


# Counts


def test_counts_add_up() -> None:
    counts = Counts(steps=1, micro_batches=2, cells=3, tokens=4, unsplit_cells=5, seconds=0.5)
    counts.add(Counts(steps=10, micro_batches=20, cells=30, tokens=40, unsplit_cells=50, seconds=0.25))
    assert counts == Counts(steps=11, micro_batches=22, cells=33, tokens=44, unsplit_cells=55, seconds=0.75)


def test_counts_over_ranks_are_summed_or_those_of_the_slowest() -> None:
    counts = Counts(steps=2, micro_batches=7, cells=100, tokens=60, unsplit_cells=300, seconds=1.5)
    merged = counts.over(FakeRanks(lambda number: number * 2))
    assert merged == Counts(steps=4, micro_batches=14, cells=300, tokens=180, unsplit_cells=900, seconds=3.0)
    assert all(type(value) is (float if "seconds" in name else int) for name, value in vars(merged).items())
    assert counts.over(ALONE) == counts


def test_padding_fractions() -> None:
    counts = Counts(cells=80, tokens=60, unsplit_cells=240)
    assert (counts.padding_fraction, counts.padding_fraction_unsplit) == (0.25, 0.75)
    assert (Counts().padding_fraction, Counts().padding_fraction_unsplit) == (0, 0)


def test_there_is_no_negative_padding() -> None:
    assert Counts(tokens=10, unsplit_cells=5).padding_fraction_unsplit == 0


# StepReport


def test_a_step_counts_its_micro_batches_and_what_its_batches_would_have_been() -> None:
    steps = StepReport()
    run(steps, [(40, 30), (12, 12)], [[10, 4, 3], [7, 18]])
    assert steps.since_log == Counts(steps=1, micro_batches=2, cells=52, tokens=42, unsplit_cells=3 * 10 + 2 * 18)
    assert steps.max_tokens == 64


def test_a_step_counts_once_as_it_was_planned_last() -> None:
    steps = StepReport()
    steps.plan_step(step_of((100, 30)), [as_sizes([30])], 64)
    assert steps.since_log == Counts()
    run(steps, [(40, 30)], [[30]])
    steps.count_step()
    assert steps.since_log == Counts(steps=1, micro_batches=1, cells=40, tokens=30, unsplit_cells=30)


def test_source_and_target_are_padded_separately() -> None:
    steps = StepReport()
    run(steps, [(9, 9)], [[(10, 2), (3, 8)]])
    assert steps.since_log.unsplit_cells == 2 * (10 + 8)


def test_log_entries_are_those_since_the_last_log(clock: list[float]) -> None:
    steps = StepReport()
    for tokens in (30, 50):
        steps.start_step()
        clock[0] += 2
        run(steps, [(50, tokens), (50, tokens), (0, 0)], [[9]], 128)
        steps.stop_clock()
    assert steps.flush(ALONE, peak_bytes=77) == {
        "mbp_micro_batches": 3,
        "mbp_padding_fraction": pytest.approx(1 - 160 / 200),
        "mbp_tokens_per_second": 160 / 4,
        "mbp_overhead_fraction": 0.0,
        "mbp_cells": 200,
        "mbp_tokens": 160,
        "mbp_max_tokens": 128,
        "mbp_peak_memory_bytes": 77,
        "mbp_oom_retries": 0,
    }
    run(steps, [(10, 10)], [])
    assert steps.flush(ALONE, 0)["mbp_tokens"] == 10


def test_log_entries_of_several_ranks() -> None:
    steps = StepReport()
    run(steps, [(40, 30), (20, 20)], [[9]])
    logs = steps.flush(FakeRanks(lambda number: number, lambda number: 3 * number), 0)
    assert (logs["mbp_cells"], logs["mbp_tokens"]) == (60 * 5, 50 * 5)
    assert logs["mbp_padding_fraction"] == pytest.approx(1 / 6)


def test_totals_are_those_of_all_steps(clock: list[float]) -> None:
    steps = StepReport()
    for _ in range(3):
        steps.start_step()
        clock[0] += 1
        run(steps, [(40, 30), (20, 20)], [[10, 9, 8, 7, 6, 5, 4, 1]])
        steps.flush(ALONE, 0)
    steps.stop_clock()
    run(steps, [(20, 20)], [[20]])
    assert steps.totals(ALONE) == {
        "mbp_micro_batches": 7 / 4,
        "mbp_cells": 200,
        "mbp_tokens": 170,
        "mbp_padding_fraction": pytest.approx(1 - 170 / 200),
        "mbp_padding_fraction_unsplit": pytest.approx(1 - 170 / 260),
        "mbp_tokens_per_second": pytest.approx(170 / 3),
        "mbp_overhead_fraction": 0.0,
        "mbp_oom_retries": 0,
    }


def test_nothing_was_done() -> None:
    assert set(StepReport().flush(ALONE, 0).values()) == {0}
    assert set(StepReport().totals(ALONE).values()) == {0}


# The clock


def test_the_clock_stands_still_between_steps(clock: list[float]) -> None:
    steps = StepReport()
    for work, pause in ((2, 100), (3, 1000)):
        steps.start_step()
        clock[0] += work
        steps.stop_clock()
        clock[0] += pause
    assert steps.since_log.seconds == 5


def test_a_step_that_was_not_ended_counts_until_the_next(clock: list[float]) -> None:
    steps = StepReport()
    steps.start_step()
    clock[0] += 2
    steps.start_step()
    clock[0] += 3
    steps.stop_clock()
    steps.stop_clock()
    assert steps.since_log.seconds == 5


# Own time


def test_own_time_is_what_is_not_computing(clock: list[float]) -> None:
    steps = StepReport()
    for own, pass_, stock in ((1, 30, 2), (2, 60, 5)):
        steps.start_step()
        with steps.overhead():
            clock[0] += own
            with steps.computing():
                clock[0] += pass_
        clock[0] += stock
        steps.stop_clock()
    assert (steps.since_log.overhead_seconds, steps.since_log.seconds) == (3, 100)
    assert steps.flush(ALONE, 0)["mbp_overhead_fraction"] == 0.03
    assert steps.totals(ALONE)["mbp_overhead_fraction"] == 0.03


def test_a_pass_that_runs_out_of_memory_is_not_own_time(clock: list[float]) -> None:
    steps = StepReport()

    def fail() -> None:
        with steps.computing():
            clock[0] += 30
            raise MemoryError

    with steps.overhead():
        with pytest.raises(MemoryError):
            fail()
        clock[0] += 1
    assert steps.since_log.overhead_seconds == 1


def test_own_time_of_ranks_is_that_of_the_one_that_waits_for_no_other() -> None:
    counts = Counts(seconds=10.0, overhead_seconds=3.0).over(FakeRanks(lambda number: number / 2))
    assert (counts.seconds, counts.overhead_seconds) == (10, 1.5)


# Notes for the reader


def steps_with(clock: list[float], *, steps: int, collation: float, rest: float) -> StepReport:
    noted = StepReport()
    for _ in range(steps):
        noted.start_step()
        with noted.collation():
            clock[0] += collation
        clock[0] += rest
        run(noted, [(10, 8)], [[8]])
        noted.stop_clock()
    return noted


def test_slow_collation_is_noted_once_there_are_steps_to_tell(clock: list[float]) -> None:
    assert steps_with(clock, steps=9, collation=2, rest=8).slow_collation_note() is None
    note = steps_with(clock, steps=10, collation=2, rest=8).slow_collation_note()
    assert note is not None
    assert note.startswith("hf_mbp: 20% of the time goes into the data collator")
    assert "collate_in='workers'" in note
    assert steps_with(clock, steps=20, collation=1, rest=9).slow_collation_note() is None


def test_slow_collation_is_told_once_while_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "SLOW_COLLATION", 0.0)
    trained(tmp_path, max_steps=14)
    assert capsys.readouterr().out.count("goes into the data collator") == 1


def test_rows_that_come_padded_are_noted() -> None:
    note = padded_rows_note(step_of((100, 30), (60, 30)), [as_sizes([50, 50]), as_sizes([60])])
    assert note is not None
    assert note.startswith("hf_mbp: 62% of the tokens in these rows is padding that they came with")
    assert padded_rows_note(step_of((100, 96)), [as_sizes([100])]) is None


def test_rows_that_come_padded_are_told_when_training_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {key: value + [0 if key != "labels" else -100] * (30 - len(value)) for key, value in row.items()}
        for row in with_labels(token_rows(), masked_prefix)
    ]
    trainer = mbp_trainer(build(BertForMaskedLM, bert_config()), rows, tmp_path, check_at_start=False)
    trainer.train()
    assert "is padding that they came with. Tokenise without padding" in capsys.readouterr().out


# The line for the reader


def test_first_line_says_what_will_happen() -> None:
    micro_batches = step_of((1000, 900), (500, 450))
    line = start_line(1600, micro_batches, [as_sizes([100] * 20)], "at most 1,024 tokens each, as asked", "Exact.")
    assert line == (
        "hf_mbp: 1,600 rows a step run as 2 micro-batches (at most 1,024 tokens each, as asked). "
        "Padding in the first step: 10.0% of 1,500 cells; 32.5% of 2,000 without splitting. Exact."
    )


def test_first_line_of_several_ranks_speaks_of_one() -> None:
    line = start_line(3, step_of((16, 11)), [as_sizes([5] * 3)], "as asked", "Exact.", num_ranks=2)
    assert line.startswith("hf_mbp: 3 rows a step on the first of 2 processes run as 1 micro-batch (as asked). ")


# In a run


def trained(folder: Path, **changes: Any) -> Any:
    rows = with_labels(token_rows(), masked_prefix)
    options = {"check_at_start": False, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
    trainer = mbp_trainer(build(BertForMaskedLM, bert_config()), rows, folder, **{**options, **changes})
    return trainer, trainer.train().metrics


def test_logs_and_metrics_of_a_run(tmp_path: Path) -> None:
    recorder = Recorder()
    _, metrics = trained(tmp_path, max_steps=3, callbacks=[recorder])
    tokens = sum(len(row["input_ids"]) for row in token_rows())
    logs = recorder.logs
    assert [entry["mbp_tokens"] for entry in logs] == [tokens] * 3
    assert all(entry["mbp_micro_batches"] >= tokens / 64 for entry in logs)
    assert all(entry["mbp_max_tokens"] == 64 for entry in logs)
    assert all(entry["mbp_peak_memory_bytes"] > 10**7 for entry in logs)
    assert all(entry["mbp_tokens_per_second"] > 0 for entry in logs)
    assert metrics["mbp_tokens"] == 3 * tokens
    assert metrics["mbp_cells"] == sum(entry["mbp_cells"] for entry in logs)
    assert 0 <= metrics["mbp_padding_fraction"] < metrics["mbp_padding_fraction_unsplit"] < 1


class SlowPad(Pad):
    """Takes 20 ms for a micro-batch."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        time.sleep(0.02)
        return super().__call__(rows)


def test_own_time_of_a_run_is_counted(tmp_path: Path) -> None:
    """What a slow collator takes is in it, what slow passes take is not."""
    recorder, model = Recorder(), build(BertForMaskedLM, bert_config())
    model.register_forward_hook(lambda *_: time.sleep(0.02))
    rows = with_labels(token_rows(), masked_prefix)
    options = {"check_at_start": False, "max_steps": 3, "callbacks": [recorder], "data_collator": SlowPad()}
    trainer = mbp_trainer(model, rows, tmp_path, **options)
    counted: list[Counts] = []
    flush = trainer._report.flush

    def noted(*args: Any) -> dict[str, float]:
        counted.append(replace(trainer._report.since_log))
        return flush(*args)

    trainer._report.flush = noted
    metrics = trainer.train().metrics
    for counts, logs in list(zip(counted, recorder.logs, strict=True))[1:]:
        slept = 0.02 * logs["mbp_micro_batches"]
        assert slept <= counts.collation_seconds <= counts.overhead_seconds <= counts.seconds - slept
        assert logs["mbp_overhead_fraction"] == counts.overhead_seconds / counts.seconds
    assert 0 < metrics["mbp_overhead_fraction"] < 1
    assert not any("mbp_overhead_fraction" in entry for entry in trainer.state.log_history if "loss" in entry)


def test_two_runs_leave_the_same_log_history(tmp_path: Path) -> None:
    (first, _), (second, _) = (trained(tmp_path / name, max_steps=2) for name in "ab")
    histories = [[entry for entry in run.state.log_history if "loss" in entry] for run in (first, second)]
    assert histories[0] == histories[1]
    assert len(histories[0]) == 2


@pytest.mark.parametrize(("rows", "batches"), [(16, 1), (1, 16)])
def test_padding_is_compared_with_that_of_the_batches_as_they_were_read(
    rows: int, batches: int, tmp_path: Path
) -> None:
    _, metrics = trained(tmp_path, per_device_train_batch_size=rows, gradient_accumulation_steps=batches)
    lengths = [len(row["input_ids"]) for row in token_rows()]
    expected = 1 - sum(lengths) / (16 * max(lengths)) if rows == 16 else 0
    assert metrics["mbp_padding_fraction_unsplit"] == pytest.approx(expected)


def test_a_second_run_counts_from_zero(tmp_path: Path) -> None:
    trainer, first = trained(tmp_path, max_steps=2)
    second = trainer.train().metrics
    assert second["mbp_tokens"] == first["mbp_tokens"]


def test_the_script_prints_the_own_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import overhead

    monkeypatch.setattr(overhead, "ROWS", 4)
    monkeypatch.setattr(overhead, "STEPS", 3)
    tiny = bert_config(vocab_size=2000, max_position_embeddings=512)
    monkeypatch.setattr(overhead, "make_model", lambda path: build(BertForSequenceClassification, tiny))
    overhead.main(None)
    assert re.search(r"Own time of the library: \d+\.\d\d% of a step \(.* in 2 steps of", capsys.readouterr().out)
