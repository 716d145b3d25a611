"""Weights, losses, counts and metrics of a run are those of `Trainer`, where that is right, and say what really ran."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.trainer
from transformers import LlamaForCausalLM, Seq2SeqTrainer, T5ForConditionalGeneration, Trainer, TrainerCallback

from hf_mbp import MBPSeq2SeqTrainer
from tests.contract.scenario import (
    Side,
    assert_same_weights,
    assert_trained,
    class_rows,
    classifier,
    compared,
    weights,
    without_measurements,
)
from tests.helpers import (
    Recorder,
    build,
    llama_config,
    masked_prefix,
    t5_config,
    token_rows,
    with_labels,
)

TOKENS = sum(len(row["input_ids"]) for row in class_rows())


def accuracy(given: Any) -> dict[str, float]:
    return {"accuracy": float((given.predictions.argmax(-1) == given.label_ids).mean())}


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.5, "lr_scheduler_type": "cosine", "weight_decay": 0.1}])
def test_unaccumulated_training_ends_with_the_weights_of_stock(changes: dict[str, Any], tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[list[Any], float, dict[str, torch.Tensor]]:
        trainer = side.trainer(num_train_epochs=3, train_dataset=class_rows(44), **changes)
        loss = trainer.train().training_loss
        return [without_measurements(entry) for entry in trainer.state.log_history], loss, weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert len(ours[0]) == len(stock[0]) == 10
    for entry, expected in zip(ours[0], stock[0], strict=True):
        assert entry == pytest.approx(expected, rel=1e-6)
    assert ours[1] == pytest.approx(stock[1], rel=1e-6)
    assert_trained(ours[2])
    assert_same_weights(ours[2], stock[2], within=1e-6)


class RunsOutOfMemory(TrainerCallback):
    """Once, at the second step: at its start, in its forward pass, or after its update."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.has_failed = False

    def fail(self, where: str, step: int) -> None:
        if where == self.where and step == 1 and not self.has_failed:
            self.has_failed = True
            raise RuntimeError("CUDA out of memory.")

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        model.register_forward_pre_hook(lambda *_: self.fail("forward", state.global_step))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fail("begin", state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.fail("end", state.global_step)


@pytest.mark.parametrize("where", ["begin", "end"])
def test_auto_find_batch_size_starts_again_with_the_rows_of_stock(where: str, tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[Any, dict[str, float]]:
        trainer = side.trainer(auto_find_batch_size=True, callbacks=[RunsOutOfMemory(where)])
        if not side.is_ours:
            return trainer, trainer.train().metrics
        warning = "auto_find_batch_size starts again with 14 rows instead of 16, which changes the optimisation"
        with pytest.warns(UserWarning, match=warning):
            return trainer, trainer.train().metrics

    (stock, _), (ours, metrics) = compared(tmp_path, scenario)
    assert ours._train_batch_size == stock._train_batch_size == 14
    assert ours.state.train_batch_size == stock.state.train_batch_size
    assert ours.state.global_step == stock.state.global_step == 8
    assert metrics["mbp_tokens"] == 2 * TOKENS
    assert_trained(weights(ours))
    assert_same_weights(weights(ours), weights(stock))


def test_auto_find_batch_size_is_not_needed_in_a_forward_pass(tmp_path: Path) -> None:
    """There memory runs out as a rule: stock starts again with fewer rows, we go on with as many as were asked for."""

    def scenario(side: Side) -> tuple[Any, dict[str, torch.Tensor]]:
        fails = side.trainer(auto_find_batch_size=True, callbacks=[RunsOutOfMemory("forward")])
        fails.train()
        undisturbed = side.trainer()
        undisturbed.train()
        return fails, weights(undisturbed)

    (stock, _), (ours, undisturbed) = compared(tmp_path, scenario)
    assert (stock._train_batch_size, ours._train_batch_size) == (14, 16)
    assert (stock.state.global_step, ours.state.global_step) == (8, 6)
    assert_trained(weights(ours))
    assert_same_weights(weights(ours), undisturbed, within=1e-7)


def test_auto_find_batch_size_changes_nothing_where_memory_suffices(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        plain, finding = side.trainer(), side.trainer(auto_find_batch_size=True)
        for trainer in (plain, finding):
            trainer.train()
            assert trainer.state.global_step == 6
        return weights(plain), weights(finding)

    stock, ours = compared(tmp_path, scenario)
    assert_same_weights(ours[1], ours[0], within=0)
    assert_same_weights(ours[1], stock[1])


class Noise(TrainerCallback):
    """Notes by how much what the first layer gets differs from the embeddings of its tokens, and how wide it is."""

    def __init__(self, model: Any) -> None:
        self.training: list[tuple[float, int]] = []
        self.evaluation: list[float] = []
        self.is_watching = False
        self.ids = torch.empty(0)
        model.model.embed_tokens.register_forward_pre_hook(self.note_ids)
        model.model.layers[0].register_forward_pre_hook(self.note_noise)

    def note_ids(self, module: Any, inputs: Any) -> None:
        (self.ids,) = inputs
        self.table = module.weight

    def note_noise(self, module: Any, inputs: Any) -> None:
        noise = float((inputs[0] - self.table[self.ids]).abs().max().detach())
        if not module.training:
            self.evaluation.append(noise)
        elif self.is_watching:
            self.training.append((noise, self.ids.shape[-1]))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.is_watching = True


def test_neftune_adds_noise_in_training_and_leaves_no_trace(tmp_path: Path) -> None:
    rows = with_labels(token_rows(32), masked_prefix)

    def scenario(side: Side) -> Noise:
        model = build(LlamaForCausalLM, llama_config())
        noise = Noise(model)
        hooks = len(model.model.embed_tokens._forward_hooks)
        trainer = side.trainer(
            model=model,
            train_dataset=rows,
            eval_dataset=rows[:4],
            eval_strategy="epoch",
            neftune_noise_alpha=5.0,
            callbacks=[noise],
        )
        trainer.train()
        assert len(model.model.embed_tokens._forward_hooks) == hooks
        assert not hasattr(model.model.embed_tokens, "neftune_noise_alpha")
        model.train()
        noise.training.append((-1.0, 1))
        model(input_ids=torch.tensor([rows[0]["input_ids"]]))
        return noise

    stock, ours = compared(tmp_path, scenario)
    assert len(ours.training) > len(stock.training) == 4 + 2
    for noise in (stock, ours):
        *during, mark, (after, _) = noise.training
        assert mark == (-1.0, 1)
        assert all(0 < size <= 5 / (width * 16) ** 0.5 for size, width in during)
        assert len({size for size, _ in during}) == len(during)
        assert after == 0
    assert set(ours.evaluation) == set(stock.evaluation) == {0.0}


def causal() -> tuple[Any, list[dict[str, Any]]]:
    return build(LlamaForCausalLM, llama_config()), with_labels(token_rows(), masked_prefix)


SMOOTHED: dict[str, tuple[Callable[[], Any], float]] = {
    "classes": (lambda: (classifier(), class_rows(16)), 1e-12),
    "tokens": (causal, 1e-6),
}


@pytest.mark.parametrize("kind", SMOOTHED)
def test_smoothed_labels_have_the_loss_of_one_whole_batch(kind: str, tmp_path: Path) -> None:
    make, within = SMOOTHED[kind]

    def scenario(side: Side, smoothing: float = 0.2) -> tuple[float, dict[str, torch.Tensor]]:
        model, rows = make()
        recorder = Recorder()
        trainer = side.trainer(
            model=model, train_dataset=rows, max_steps=1, callbacks=[recorder], label_smoothing_factor=smoothing
        )
        trainer.train()
        return recorder.logs[0]["loss"], recorder.gradients[0]

    stock, ours = compared(tmp_path, scenario)
    _, plain = compared(tmp_path, lambda side: scenario(side, 0.0))
    assert ours[0] == pytest.approx(stock[0], rel=within)
    assert ours[0] != pytest.approx(plain[0], rel=1e-4)
    norm = sum(float(gradient.pow(2).sum()) for gradient in stock[1].values()) ** 0.5
    torch.testing.assert_close(ours[1], stock[1], rtol=0, atol=within * norm)


def test_tokens_seen_are_those_of_stock_without_padding_and_fewer_with_it(tmp_path: Path) -> None:
    def scenario(side: Side, mode: str) -> tuple[list[int], Any, dict[str, float]]:
        trainer = side.trainer(
            include_num_input_tokens_seen=mode, per_device_train_batch_size=8, gradient_accumulation_steps=2
        )
        metrics = trainer.train().metrics
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        assert all(entry["train_tokens_per_second"] > 0 for entry in logs)
        return [entry["num_input_tokens_seen"] for entry in logs], trainer.state, metrics

    stock, ours = compared(tmp_path, lambda side: scenario(side, "non_padding"))
    assert ours[0] == stock[0]
    assert ours[1].num_input_tokens_seen == stock[1].num_input_tokens_seen == 2 * TOKENS

    stock, ours = compared(tmp_path, lambda side: scenario(side, "all"))
    assert all(seen < expected for seen, expected in zip(ours[0], stock[0], strict=True))
    assert ours[1].num_input_tokens_seen == ours[2]["mbp_cells"]
    assert 2 * TOKENS < ours[1].num_input_tokens_seen < stock[1].num_input_tokens_seen


def test_operations_are_those_that_ran(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[float, float, dict[str, float], Any]:
        trainer = side.trainer(per_device_train_batch_size=8, gradient_accumulation_steps=2)
        metrics = trainer.train().metrics
        return trainer.state.total_flos, trainer.state.log_history[-1]["total_flos"], metrics, trainer.model

    stock, ours = compared(tmp_path, scenario)
    assert stock[0] == stock[1]
    assert 0 < ours[0] < stock[0]
    assert ours[0] == ours[1] == 6 * ours[2]["mbp_cells"] * ours[3].num_parameters(exclude_embeddings=True)


def test_speed_is_told_in_the_rows_and_steps_of_the_loader(tmp_path: Path) -> None:
    def scenario(side: Side) -> dict[str, float]:
        return side.trainer(train_dataset=class_rows(44)).train().metrics

    stock, ours = compared(tmp_path, scenario)
    assert {name for name in ours if not name.startswith("mbp_")} == stock.keys()
    for metrics in (stock, ours):
        runtime = metrics["train_runtime"]
        assert runtime > 0
        assert metrics["train_samples_per_second"] * runtime == pytest.approx(2 * 44, rel=0.02)
        assert metrics["train_steps_per_second"] * runtime == pytest.approx(6, rel=0.02)


def test_the_cache_is_emptied_at_the_steps_of_stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario(side: Side) -> tuple[list[int], dict[str, torch.Tensor]]:
        steps: list[int] = []
        trainer = side.trainer(torch_empty_cache_steps=2)
        monkeypatch.setattr(transformers.trainer, "clear_device_cache", lambda: steps.append(trainer.state.global_step))
        trainer.train()
        return steps, weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert stock[0] == [0, 2, 4]
    assert sorted(set(ours[0])) == [0, 2, 4]
    assert_same_weights(ours[1], stock[1])


def test_evaluation_and_prediction_say_the_same(tmp_path: Path) -> None:
    def scenario(side: Side) -> tuple[Any, Any, Any, list[Any]]:
        trainer = side.trainer(
            eval_dataset={"first": class_rows(20), "second": class_rows(9, seed=3)},
            eval_strategy="epoch",
            compute_metrics=accuracy,
        )
        before = trainer.evaluate()
        trainer.train()
        history = [without_measurements(entry) for entry in trainer.state.log_history if "loss" not in entry]
        return before, trainer.evaluate(), trainer.predict(class_rows(20)), history

    stock, ours = compared(tmp_path, scenario)
    for metrics, expected in ((ours[0], stock[0]), (ours[1], stock[1]), (ours[2].metrics, stock[2].metrics)):
        assert metrics.keys() == expected.keys()
        assert without_measurements(metrics) == pytest.approx(without_measurements(expected))
    assert ours[0]["eval_first_loss"] != pytest.approx(ours[1]["eval_first_loss"])
    assert ours[3] == [pytest.approx(entry) for entry in stock[3]]
    assert ours[2].label_ids.tolist() == stock[2].label_ids.tolist()
    np.testing.assert_allclose(ours[2].predictions, stock[2].predictions, rtol=1e-7, atol=1e-9)


def test_sequences_are_generated_as_by_stock(tmp_path: Path) -> None:
    targets = token_rows(32, seed=7, low=2, high=12)
    rows = with_labels(token_rows(32), lambda index, row: targets[index]["input_ids"])

    def lengths(given: Any) -> dict[str, float]:
        return {"length": float((given.predictions > 0).sum(-1).mean())}

    def scenario(side: Side) -> tuple[dict[str, torch.Tensor], Any, Any]:
        trainer = side.trainer(
            generation={"predict_with_generate": True, "generation_max_length": 7, "generation_num_beams": 2},
            model=build(T5ForConditionalGeneration, t5_config()),
            train_dataset=rows,
            eval_dataset=rows[:6],
            eval_strategy="epoch",
            compute_metrics=lengths,
        )
        trainer.train()
        return weights(trainer), trainer.evaluate(max_length=5), trainer.predict(rows[:6])

    kinds: tuple[type[Trainer], type[Trainer]] = (Seq2SeqTrainer, MBPSeq2SeqTrainer)
    stock, ours = compared(tmp_path, scenario, kinds=kinds)
    assert_same_weights(ours[0], stock[0], within=1e-5)
    assert without_measurements(ours[1]) == pytest.approx(without_measurements(stock[1]), rel=1e-5)
    assert (ours[2].predictions[:, :7] > 0).any()
    assert (ours[2].predictions[:, 7:] == 0).all()
    assert ours[2].predictions.tolist() == stock[2].predictions.tolist()
    assert without_measurements(ours[2].metrics) == pytest.approx(without_measurements(stock[2].metrics), rel=1e-5)


def test_liger_kernels_are_applied_once_to_the_model_that_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def scenario(side: Side) -> tuple[list[Any], dict[str, torch.Tensor]]:
        applied: list[Any] = []
        monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", lambda *given: applied.append(given))
        trainer = side.trainer(use_liger_kernel=True, liger_kernel_config={"rope": False})
        trainer.train()
        assert [model for model, _ in applied] == [trainer.model]
        return [config for _, config in applied], weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert ours[0] == stock[0] == [{"rope": False}]
    assert_same_weights(ours[1], stock[1])


def test_a_model_with_liger_kernels_trains_as_with_stock(tmp_path: Path) -> None:
    """The kernels themselves want a GPU; on a CPU all are switched off, and only the way there is tried."""
    pytest.importorskip("liger_kernel")
    has_gpu = torch.cuda.is_available()
    kernels = ("rope", "swiglu", "rms_norm", "cross_entropy", "fused_linear_cross_entropy")

    def scenario(side: Side) -> tuple[list[float], dict[str, torch.Tensor]]:
        model, rows = build(LlamaForCausalLM, llama_config()).float(), with_labels(token_rows(48), masked_prefix)
        recorder = Recorder()
        trainer = side.trainer(
            model=model,
            train_dataset=rows,
            optim="sgd",
            use_cpu=not has_gpu,
            use_liger_kernel=True,
            liger_kernel_config=None if has_gpu else dict.fromkeys(kernels, False),
            callbacks=[recorder],
        )
        trainer.train()
        return [entry["loss"] for entry in recorder.logs], weights(trainer)

    stock, ours = compared(tmp_path, scenario)
    assert ours[0] == pytest.approx(stock[0], rel=1e-5)
    assert len(ours[0]) == 6
    assert_same_weights(ours[1], stock[1], within=1e-5)
