"""The trainers of TRL with `MBPMixin` do what they do unsplit: gradients, and every number that they log."""

import copy
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import trl

from hf_mbp import MBPMixin, check_equivalence
from hf_mbp.call_metrics import CallMetrics
from hf_mbp.other_trainers import refusals
from hf_mbp.step import MicroBatch
from tests.helpers import Recorder, relative_error
from tests.trl_runs import (
    CASES,
    NO_RECOMPUTATION,
    TRAINERS,
    Case,
    Outcome,
    chat_tokenizer,
    dataset,
    model_of,
    outcome_of,
    trainer_of,
    uneven_sizes,
)

pytestmark = [
    # TRL says so of options that it still supports, and touches an old name of transformers itself.
    pytest.mark.filterwarnings("ignore:`(compute_loss_func|label_smoothing_factor)` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LOGGED = {
    "SFT": {"entropy", "mean_token_accuracy", "num_tokens"},
    "Reward": {"min_reward", "mean_reward", "max_reward", "accuracy", "margin", "num_tokens"},
    "DPO": {
        "entropy",
        "num_tokens",
        "mean_token_accuracy",
        *(f"{name}/{side}" for name in ("logits", "logps", "rewards") for side in ("chosen", "rejected")),
        "rewards/accuracies",
        "rewards/margins",
    },
}
OF_THE_LOOP = {"epoch", "step", "learning_rate"}
"""Logged by the stock loop; how far an epoch has come depends on its number of batches, split or not."""

ACCUMULATED = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}

Runs = Callable[..., Outcome]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """The outcome of a case, run once for all the tests that look at it."""
    done: dict[tuple[str, bool, bool], Outcome] = {}

    def outcome(name: str, *, split: bool, accumulated: bool = False) -> Outcome:
        key = (name, split, accumulated)
        if key not in done:
            folder, case = tmp_path_factory.mktemp(name), CASES[name]
            rows = dataset(case.rows, uneven_sizes(32))
            done[key] = outcome_of(
                trainer_of(case, rows, folder, split=split, **(ACCUMULATED if accumulated else {})),
            )
        return done[key]

    return outcome


def approximately(value: float) -> Any:
    return pytest.approx(value, rel=1e-6, abs=1e-7)


def assert_same_gradients(case: Case, whole: Outcome, split: Outcome) -> None:
    assert len(split.gradients) == len(whole.gradients) == 2
    for expected, actual in zip(whole.gradients, split.gradients, strict=True):
        assert sum(float(gradient.norm()) for gradient in expected.values()) > 0.01
        assert relative_error(expected, actual) < case.bound
        assert max(float((expected[name] - actual[name]).abs().max()) for name in expected) < case.largest


def assert_same_logs(case: Case, whole: Outcome, split: Outcome) -> None:
    assert len(split.logs) == len(whole.logs) == 2
    for expected, actual in zip(whole.logs, split.logs, strict=True):
        names = expected.keys() - OF_THE_LOOP
        assert names == LOGGED[case.trainer] | {"loss", "grad_norm"}
        assert {name: actual[name] for name in names} == {name: approximately(expected[name]) for name in names}


# Gradients and logs of two steps


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_unsplit_trainer(name: str, runs: Runs) -> None:
    split = runs(name, split=True)
    for plan, log in zip(split.plans, split.logs, strict=True):
        assert len(plan) == log["mbp_micro_batches"] >= 3
        assert all(cells <= 64 for _, cells, _ in plan)
    assert_same_gradients(CASES[name], runs(name, split=False), split)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.padding_free])
def test_rows_that_lie_end_to_end_have_no_padding(name: str, runs: Runs) -> None:
    split = runs(name, split=True)
    assert [log["mbp_padding_fraction"] for log in split.logs] == [0.0, 0.0]
    assert any(rows > 1 for plan in split.plans for rows, _, _ in plan)


@pytest.mark.parametrize("name", CASES)
def test_every_logged_number_is_that_of_the_unsplit_trainer(name: str, runs: Runs) -> None:
    assert_same_logs(CASES[name], runs(name, split=False), runs(name, split=True))


@pytest.mark.parametrize("name", CASES)
def test_four_batches_of_four_rows_are_one_of_sixteen(name: str, runs: Runs) -> None:
    whole, split = runs(name, split=False), runs(name, split=True, accumulated=True)
    assert all(len(plan) >= 3 for plan in split.plans)
    assert_same_gradients(CASES[name], whole, split)
    assert_same_logs(CASES[name], whole, split)


@pytest.mark.parametrize(
    ("name", "metrics"),
    [
        ("sft-completion", ["entropy", "mean_token_accuracy"]),
        ("reward", ["min_reward", "mean_reward", "max_reward", "margin"]),
        (
            "dpo-sigmoid",
            ["entropy", "mean_token_accuracy", "logits/chosen", "logps/rejected", "rewards/chosen", "rewards/margins"],
        ),
    ],
)
def test_an_average_over_the_calls_would_be_another_number(
    name: str, metrics: list[str], runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What TRL would log if nothing were put together: the rows are uneven enough for the tests above to tell."""
    monkeypatch.setattr(CallMetrics, "call", lambda self, micro_batch: nullcontext())
    case, whole = CASES[name], runs(name, split=False)
    by_call = outcome_of(trainer_of(case, dataset(case.rows, uneven_sizes(32)), tmp_path, split=True, max_steps=1))
    assert by_call.logs[0]["num_tokens"] == whole.logs[0]["num_tokens"]
    for metric in metrics:
        expected = whole.logs[0][metric]
        assert abs(by_call.logs[0][metric] - expected) > 100 * max(1e-6 * abs(expected), 1e-7)


def test_rows_without_targets_count_as_tokens_too(tmp_path: Path) -> None:
    """Packing by cutting leaves rows of nothing but a prompt; TRL counts their tokens, though they teach nothing."""
    case = Case(
        trainer="SFT",
        rows="completion",
        config={"packing": True, "packing_strategy": "wrapped", "max_length": 16},
    )
    rows = dataset(case.rows, [(50 + index % 5, 2 + index % 4, 1) for index in range(16)])
    whole, split = (
        outcome_of(trainer_of(case, rows, tmp_path / str(is_split), split=is_split)) for is_split in (False, True)
    )
    assert_same_gradients(case, whole, split)
    assert_same_logs(case, whole, split)


# The probes before the first step


def tokens_of(row: dict[str, Any]) -> int:
    """Of one row as TRL tokenised it: both sides of a pair begin with the prompt."""
    if "input_ids" in row:
        return len(row["input_ids"])
    return len(row["chosen_ids"]) + len(row["rejected_ids"]) + 2 * len(row.get("prompt_ids", []))


@pytest.mark.parametrize("name", ["sft-completion", "reward", "dpo-sigmoid"])
def test_tokens_of_the_probes_are_not_counted(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    rows = dataset(case.rows, uneven_sizes(32))
    trainer = trainer_of(case, rows, tmp_path, split=True, train_sampling_strategy="sequential")
    counts = [tokens_of(row) for row in trainer.train_dataset]
    report = check_equivalence(trainer)
    assert report.num_micro_batches >= 2
    assert trainer._metrics == {"train": {}, "eval": {}}
    assert trainer._total_train_tokens == 0
    logs = outcome_of(trainer).logs
    assert [log["num_tokens"] for log in logs] == [sum(counts[:16]), sum(counts)]


@pytest.mark.parametrize("name", ["sft-completion", "reward", "dpo-sigmoid"])
def test_a_check_keeps_what_was_noted_before(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    trainer = trainer_of(case, dataset(case.rows, uneven_sizes(16)), tmp_path, split=True)
    trainer._metrics["train"]["entropy"] += [1.5, 2.5]
    trainer._metrics["train"]["num_tokens"] = [70]
    trainer._total_train_tokens = 70
    before = copy.deepcopy(trainer._metrics)
    assert check_equivalence(trainer).is_exact
    assert trainer._metrics == before
    assert trainer._total_train_tokens == 70


# `CallMetrics` by itself


class ScriptedRanks:
    """This rank, and others that say what they are told to; `others` are rows as `Ranks.gather` returns them."""

    def __init__(self, *others: list[float]) -> None:
        self.others = others

    def gather(self, *numbers: float) -> list[list[float]]:
        return [list(numbers), *self.others]


def noting_trainer(**attributes: Any) -> Any:
    """A stand-in for a trainer of TRL that has noted nothing yet."""
    gathers = {name: lambda tensor: pytest.fail("gathered over the ranks") for name in ("gather", "gather_for_metrics")}
    return SimpleNamespace(_metrics={"train": defaultdict(list)}, accelerator=SimpleNamespace(**gathers), **attributes)


def micro_batch(*, num_rows: int = 2, num_items: float = 1.0, **inputs: torch.Tensor) -> MicroBatch:
    inputs = inputs or {"input_ids": torch.ones(num_rows or 1, 3, dtype=torch.long)}
    return MicroBatch(inputs=inputs, num_rows=num_rows, num_items=num_items, cells=6, tokens=6)


def note(metrics: CallMetrics, trainer: Any, of: MicroBatch, **values: float) -> None:
    """One call of `compute_loss`, which notes the values as TRL does."""
    with metrics.call(of):
        for name, value in values.items():
            gathered = trainer.accelerator.gather(torch.tensor(value, dtype=torch.float64))
            trainer._metrics["train"][name].append(gathered.mean().item())


def test_means_are_weighed_by_items_and_extremes_are_not() -> None:
    trainer = noting_trainer()
    metrics = CallMetrics(trainer, ScriptedRanks())
    note(metrics, trainer, micro_batch(num_items=1), entropy=1.0, min_reward=-1.0, max_reward=2.0)
    note(metrics, trainer, micro_batch(num_items=3), entropy=5.0, min_reward=-4.0, max_reward=0.5)
    assert trainer._metrics["train"] == {}
    metrics.merge()
    assert trainer._metrics["train"] == {"entropy": [4.0], "min_reward": [-4.0], "max_reward": [2.0]}


def test_each_step_appends_one_entry() -> None:
    trainer = noting_trainer()
    metrics = CallMetrics(trainer, ScriptedRanks())
    for value in (1.0, 2.0):
        note(metrics, trainer, micro_batch(), entropy=value)
        note(metrics, trainer, micro_batch(), entropy=value + 2)
        metrics.merge()
    metrics.merge()  # nothing was noted since
    assert trainer._metrics["train"] == {"entropy": [2.0, 3.0]}


def test_fillers_are_left_out_however_many() -> None:
    trainer = noting_trainer(_total_train_tokens=100)
    metrics = CallMetrics(trainer, ScriptedRanks())
    for of, tokens, value in [
        (micro_batch(num_items=2), 6, 1.0),
        (micro_batch(num_rows=0, num_items=0), 7, -50.0),
        (micro_batch(num_rows=0, num_items=0), 7, 90.0),
        (micro_batch(num_items=2), 5, 3.0),
    ]:
        with metrics.call(of):
            trainer._total_train_tokens += tokens
            for name in ("entropy", "min_reward", "max_reward"):
                trainer._metrics["train"][name].append(value)
            trainer._metrics["train"]["num_tokens"] = [trainer._total_train_tokens]
        assert trainer._total_train_tokens == 100
    metrics.merge()
    assert trainer._total_train_tokens == 111
    assert trainer._metrics["train"] == {
        "entropy": [2.0],
        "min_reward": [1.0],
        "max_reward": [3.0],
        "num_tokens": [111],
    }


def test_numbers_of_all_ranks_are_put_together() -> None:
    """A rank says its tokens, then per metric, by name: weighted sum, weights, smallest, largest."""
    inf = float("inf")
    busy = [10.0, *(12.0, 3.0, 4.0, 4.0), *(0.0, 3.0, -7.0, -7.0)]
    with_fillers_only = [0.0, *(0.0, 0.0, inf, -inf), *(0.0, 0.0, inf, -inf)]
    trainer = noting_trainer(_total_train_tokens=0)
    metrics = CallMetrics(trainer, ScriptedRanks(busy, with_fillers_only))
    with metrics.call(micro_batch(num_items=1)):
        trainer._total_train_tokens += 6
        trainer._metrics["train"]["entropy"].append(8.0)
        trainer._metrics["train"]["min_reward"].append(1.0)
    metrics.merge()
    assert trainer._metrics["train"] == {"entropy": [5.0], "min_reward": [-7.0]}
    assert trainer._total_train_tokens == 16


def test_pairs_weigh_by_what_each_metric_is_a_mean_over() -> None:
    """One pair with 1 chosen and 3 rejected tokens that are predicted, then two pairs with 4 and 2."""
    one = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 1, 1, 1]])
    two = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0], [0, 1, 0, 0, 0]])
    shares = {"entropy": (4, 6), "mean_token_accuracy": (1, 4), "logits/chosen": (1, 4), "logits/rejected": (3, 2)}
    shares |= {"rewards/chosen": (1, 2), "logps/chosen": (1, 2)}
    trainer = noting_trainer()
    metrics = CallMetrics(trainer, ScriptedRanks())
    for mask, value in ((one, 0.0), (two, 1.0)):
        of = micro_batch(num_rows=len(mask) // 2, completion_mask=mask, input_ids=torch.ones_like(mask))
        note(metrics, trainer, of, **dict.fromkeys(shares, value))
    metrics.merge()
    expected = {name: [pytest.approx(second / (first + second))] for name, (first, second) in shares.items()}
    assert trainer._metrics["train"] == expected


def test_earlier_entries_survive_a_call_that_fails() -> None:
    trainer = noting_trainer(_total_train_tokens=5)
    trainer._metrics["train"]["entropy"] = [1.0]
    gather = trainer.accelerator.gather
    metrics = CallMetrics(trainer, ScriptedRanks())

    def run_out_of_memory() -> None:
        with metrics.call(micro_batch()):
            trainer._metrics["train"]["entropy"].append(2.0)
            trainer._total_train_tokens += 3
            raise MemoryError

    with pytest.raises(MemoryError):
        run_out_of_memory()
    assert trainer._metrics["train"] == {"entropy": [1.0]}
    assert trainer._total_train_tokens == 5
    assert trainer.accelerator.gather is gather


def test_a_trainer_that_notes_nothing_is_left_alone() -> None:
    trainer = noting_trainer()
    del trainer._metrics
    gather = trainer.accelerator.gather
    before = dict(vars(trainer))
    metrics = CallMetrics(trainer, ScriptedRanks())
    with metrics.call(micro_batch()):
        assert trainer.accelerator.gather is gather
    metrics.merge()
    assert vars(trainer) == before


# What is refused


@pytest.mark.parametrize(
    ("loss_types", "reason"),
    [
        (["sigmoid", "sft"], r"a mean over tokens \('sft'\) and one over pairs, two denominators"),
        (["aot"], "'aot' compares the pairs of a batch with each other, and micro-batches have fewer"),
        (["sigmoid", "aot_unpaired"], "'aot_unpaired' compares the pairs of a batch"),
    ],
)
def test_losses_of_dpo_that_are_no_mean_over_one_thing(loss_types: list[str], reason: str, tmp_path: Path) -> None:
    case = Case(trainer="DPO", rows="preference", config={"loss_type": loss_types})
    with pytest.raises(ValueError, match=reason) as refusal:
        trainer_of(case, dataset("preference", uneven_sizes(4)), tmp_path, split=True)
    assert f"Micro-batching does not support loss_type={loss_types} of DPO" in str(refusal.value)
    assert str(refusal.value).endswith("Use one of them, or trl.DPOTrainer as it is.")


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer", "KTOTrainer"])
def test_other_trainers_of_trl(name: str) -> None:
    trainer_class = type("Split", (MBPMixin, getattr(trl, name)), {})
    ((what, why),) = refusals(object.__new__(trainer_class))
    assert what == f"trl.{name}"
    assert why == f"only SFTTrainer, RewardTrainer, DPOTrainer of TRL are tested. Use trl.{name} as it is."


def test_a_trainer_of_trl_that_builds_on_a_supported_one() -> None:
    experimental = type("GKDTrainer", (trl.SFTTrainer,), {"__module__": "trl.experimental.gkd"})
    own = type("Own", (experimental,), {})
    assert [what for what, _ in refusals(object.__new__(own))] == ["trl.GKDTrainer"]


def test_a_trainer_of_ones_own_that_builds_on_a_supported_one() -> None:
    own = type("OwnTrainer", (MBPMixin, trl.SFTTrainer), {})
    assert list(refusals(object.__new__(own))) == []


def test_the_constructor_refuses(tmp_path: Path) -> None:
    rows = dataset("completion", uneven_sizes(4)).add_column("label", [True, False, True, False])
    args = trl.KTOConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
        **NO_RECOMPUTATION,
    )
    split_class: Any = type("SplitKTO", (MBPMixin, trl.KTOTrainer), {})
    model, reference = (model_of(CASES["dpo-sigmoid"], seed=seed) for seed in (0, 1))
    with pytest.raises(ValueError, match=r"Micro-batching does not support trl\.KTOTrainer: only SFTTrainer"):
        split_class(model=model, ref_model=reference, args=args, train_dataset=rows, processing_class=chat_tokenizer())


class OwnLoss(trl.SFTTrainer):
    """Leaves the loss to the model, as users do who know Trainer, and the count alone."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_loss_that_ignores_the_count_is_weighted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "SFT", (OwnLoss, type("SplitOwn", (MBPMixin, OwnLoss), {}), trl.SFTConfig))
    case, rows = CASES["sft-completion"], dataset("completion", uneven_sizes(32))
    recorders = [Recorder(), Recorder()]
    for recorder, split in zip(recorders, (False, True), strict=True):
        trainer = trainer_of(case, rows, tmp_path / str(split), split=split, max_steps=1)
        trainer.add_callback(recorder)
        trainer.model_accepts_loss_kwargs = False
        trainer.train()
    whole, halves = (recorder.gradients[0] for recorder in recorders)
    assert relative_error(whole, halves) < 5e-7
