"""`MBPTrainer` takes the data, collators and loaders that `Trainer` takes, and says no in words."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import (
    BertForSequenceClassification,
    LlamaForCausalLM,
    Seq2SeqTrainingArguments,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hf_mbp import MBPConfig, MBPMixin, MBPSeq2SeqTrainer, MBPTrainer, check_equivalence
from tests.helpers import (
    Pad,
    Recorder,
    arguments,
    bert_config,
    build,
    llama_config,
    masked_prefix,
    mbp_trainer,
    relative_error,
    t5_config,
    token_rows,
    whole_gradients,
    with_labels,
)
from tests.test_equivalence import IN_FLOAT64, class_rows, run, seq2seq_rows


def classifier(**changes: Any) -> Any:
    return build(BertForSequenceClassification, bert_config(num_labels=3, **changes))


class Stream(IterableDataset):
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers] if worker else self.rows)


def as_tensors(row: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor(value) for key, value in row.items()}


def padded_to(row: dict[str, Any], width: int) -> dict[str, Any]:
    missing = width - len(row["input_ids"])
    return {
        "input_ids": row["input_ids"] + [0] * missing,
        "attention_mask": row["attention_mask"] + [0] * missing,
        "labels": row["labels"],
    }


DATA: dict[str, Any] = {
    "lists": lambda rows: rows,
    "tensors": lambda rows: [as_tensors(row) for row in rows],
    "datasets": lambda rows: datasets.Dataset.from_list(rows),
    "datasets as tensors": lambda rows: datasets.Dataset.from_list(rows).with_format("torch"),
    "already padded": lambda rows: [padded_to(row, 30) for row in rows],
    "iterable": Stream,
    "streamed datasets": lambda rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", DATA)
def test_any_data_set(kind: str, workers: int, tmp_path: Path) -> None:
    if workers and kind == "streamed datasets":
        workers = 1  # it has one shard, and says so if there are more workers
    model, rows = classifier(), class_rows()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    trainer = mbp_trainer(
        model,
        DATA[kind](rows),
        tmp_path,
        dataloader_num_workers=workers,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        on_inexact="error",
    )
    _, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches >= 2
    assert relative_error(expected, gradients) < IN_FLOAT64


def test_rows_without_token_ids_count_as_one(tmp_path: Path) -> None:
    class Regressor(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 1)

        def forward(self, x: Any, labels: Any) -> dict[str, torch.Tensor]:
            return {"loss": (self.linear(x)[:, 0] - labels).pow(2).mean()}

    model = Regressor().double()
    rows = [{"x": torch.arange(4).double() + index, "labels": float(index)} for index in range(16)]

    def collate(rows: Any) -> Any:
        return {key: torch.stack([torch.as_tensor(row[key], dtype=torch.double) for row in rows]) for key in rows[0]}

    expected = whole_gradients(model, lambda m: m(**collate(rows))["loss"])[1]
    trainer = mbp_trainer(
        model, rows, tmp_path, data_collator=collate, max_tokens_per_micro_batch=5, on_inexact="error"
    )
    _, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches == 4
    assert relative_error(expected, gradients) < IN_FLOAT64


def test_rows_that_are_no_dictionaries(tmp_path: Path) -> None:
    model, rows = classifier(), class_rows()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]

    class OfPairs(MBPTrainer):
        def row_length(self, row: Any) -> int:
            return len(row[0])

    pairs = [(row["input_ids"], row["labels"]) for row in rows]
    trainer = mbp_trainer(
        model,
        pairs,
        tmp_path,
        trainer_class=OfPairs,
        data_collator=lambda rows: Pad()(
            [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": label} for ids, label in rows]
        ),
        on_inexact="error",
    )
    _, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches >= 2
    assert relative_error(expected, gradients) < IN_FLOAT64


def test_training_step_called_with_a_batch_runs_it_whole(tmp_path: Path) -> None:
    model, rows = classifier(), class_rows()
    whole_loss, expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)
    trainer = mbp_trainer(model, rows, tmp_path)
    trainer.current_gradient_accumulation_steps = 1
    loss = trainer.training_step(model, Pad()(rows))
    assert float(loss) == pytest.approx(whole_loss)
    assert relative_error(expected, {name: p.grad for name, p in model.named_parameters()}) < IN_FLOAT64


@pytest.mark.parametrize("accumulation", [1, 4])
def test_an_own_loader_of_batches_is_not_split_and_still_exact(accumulation: int, tmp_path: Path) -> None:
    rows = with_labels(token_rows(), masked_prefix)

    class OwnLoader(MBPTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(rows, batch_size=16 // accumulation, collate_fn=Pad())

    model = build(LlamaForCausalLM, llama_config())
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=OwnLoader, gradient_accumulation_steps=accumulation)
    _, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches == accumulation
    assert relative_error(expected, gradients) < 3e-6


def test_an_own_loader_may_be_a_list_of_batches(tmp_path: Path) -> None:
    """What `Trainer` takes, too: it reads batches, and asks for a data set only if there is one."""
    rows = with_labels(token_rows(48), lambda index, _: index % 3)

    class OwnBatches:
        def get_train_dataloader(self) -> Any:
            return [Pad()(rows[start : start + 16]) for start in range(0, 48, 16)]

    losses = []
    for kind in (Trainer, MBPTrainer):
        trainer_class = type("Own", (OwnBatches, kind), {})
        arguments_ = arguments(tmp_path, max_steps=-1, num_train_epochs=1)
        trainer = trainer_class(model=classifier(), args=arguments_, train_dataset=rows, data_collator=Pad())
        losses.append(trainer.train().metrics["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    with pytest.raises(ValueError, match="returns ready-made batches"):
        check_equivalence(trainer)


def test_the_cap_is_kept_by_collators_that_pad_to_more(tmp_path: Path) -> None:
    widths: list[tuple[int, int]] = []

    def pad_to_40(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = Pad()([padded_to(row, 40) for row in rows])
        widths.append(tuple(batch["input_ids"].shape))
        return batch

    model, rows = classifier(), class_rows()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    trainer = mbp_trainer(
        model, rows, tmp_path, data_collator=pad_to_40, max_tokens_per_micro_batch=120, check_at_start=False
    )
    _, gradients, num_micro_batches = run(trainer)
    within = [rows * width <= 120 for rows, width in widths]
    assert within.count(True) == num_micro_batches
    assert sum(rows for rows, width in widths if rows * width <= 120) == 16
    assert relative_error(expected, gradients) < IN_FLOAT64


@pytest.mark.parametrize("workers", [0, 2])
def test_weights_do_not_depend_on_budget_accumulation_or_workers(workers: int, tmp_path: Path) -> None:
    def weights(**changes: Any) -> dict[str, torch.Tensor]:
        model, rows = classifier(), with_labels(token_rows(48), lambda index, row: index % 3)
        trainer = mbp_trainer(model, rows, tmp_path, max_steps=-1, num_train_epochs=2, optim="adamw_torch", **changes)
        trainer.train()
        assert trainer.state.global_step == 6
        return model.state_dict()

    expected = weights(max_tokens_per_micro_batch=10_000)
    for changes in ({}, {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}):
        actual = weights(max_tokens_per_micro_batch=40, dataloader_num_workers=workers, **changes)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=1e-9)


def test_seq2seq_trainer_trains_and_generates(tmp_path: Path) -> None:
    model, rows = build(T5ForConditionalGeneration, t5_config()), seq2seq_rows()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    args = Seq2SeqTrainingArguments(
        **{**arguments(tmp_path).to_dict(), "predict_with_generate": True, "generation_max_length": 5}
    )
    trainer = MBPSeq2SeqTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=rows[:4],
        data_collator=Pad(),
        mbp_config=MBPConfig(max_tokens_per_micro_batch=64, on_inexact="error"),
    )
    _, gradients, num_micro_batches = run(trainer)
    assert num_micro_batches >= 2
    assert relative_error(expected, gradients) < IN_FLOAT64
    assert trainer.predict(rows[:4]).predictions.shape[0] == 4


def test_encoder_decoder_keeps_the_cap_over_source_and_target(tmp_path: Path) -> None:
    cells: list[int] = []

    class Watch(MBPTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            cells.append(inputs["input_ids"].numel() + inputs["labels"].numel())
            return super().compute_loss(model, inputs, *args, **kwargs)

    model = build(T5ForConditionalGeneration, t5_config())
    trainer = mbp_trainer(
        model, seq2seq_rows(), tmp_path, trainer_class=Watch, max_tokens_per_micro_batch=70, check_at_start=False
    )
    trainer.train()
    assert len(cells) >= 2
    assert max(cells) <= 70


class CollatesUserRows(MBPMixin, Trainer):
    """The mixin before any trainer."""


def test_the_mixin_makes_a_trainer(tmp_path: Path) -> None:
    model, rows = classifier(), class_rows()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    trainer = mbp_trainer(model, rows, tmp_path, trainer_class=CollatesUserRows)
    assert relative_error(expected, run(trainer)[1]) < IN_FLOAT64


def test_stock_columns_are_removed_before_the_collator_sees_them(tmp_path: Path) -> None:
    rows = [{**row, "comment": "not for the model"} for row in class_rows()]
    trainer = mbp_trainer(classifier(), datasets.Dataset.from_list(rows), tmp_path, remove_unused_columns=True)
    assert trainer.train().global_step == 1


def test_evaluation_uses_the_users_collator(tmp_path: Path) -> None:
    rows = class_rows()
    model = classifier()
    trainer = mbp_trainer(model, rows, tmp_path, eval_dataset=rows, per_device_eval_batch_size=16)
    with torch.no_grad():
        expected = float(model.eval()(**Pad()(rows)).loss)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected)


def test_tokens_and_operations_are_counted_as_in_stock(tmp_path: Path) -> None:
    def state(trainer_class: Any, mode: Any, extra: dict[str, Any]) -> Any:
        trainer = trainer_class(
            model=classifier(),
            args=arguments(tmp_path, include_num_input_tokens_seen=mode, gradient_accumulation_steps=2),
            train_dataset=[padded_to(row, 30) for row in class_rows() * 2],
            data_collator=Pad(),
            **extra,
        )
        trainer.train()
        return trainer.state

    mbp = {"mbp_config": MBPConfig(max_tokens_per_micro_batch=64)}
    for mode in ("all", "non_padding"):
        stock, ours = state(Trainer, mode, {}), state(MBPTrainer, mode, mbp)
        assert ours.num_input_tokens_seen == stock.num_input_tokens_seen > 0
        assert ours.total_flos == stock.total_flos > 0


def test_callbacks_see_the_events_of_stock(tmp_path: Path) -> None:
    def events(trainer_class: Any, extra: dict[str, Any]) -> list[str]:
        seen: list[str] = []

        class Listener(Recorder):
            def __getattribute__(self, name: str) -> Any:
                if name.startswith("on_"):
                    seen.append(name)
                return super().__getattribute__(name)

        trainer = trainer_class(
            model=classifier(),
            args=arguments(
                tmp_path, per_device_train_batch_size=3, gradient_accumulation_steps=2, max_steps=-1, num_train_epochs=2
            ),
            train_dataset=class_rows(),
            data_collator=Pad(),
            callbacks=[Listener()],
            **extra,
        )
        trainer.train()
        return seen

    stock = events(Trainer, {})
    assert "on_substep_end" in stock
    assert events(MBPTrainer, {"mbp_config": MBPConfig(max_tokens_per_micro_batch=40)}) == stock


class StopBeforeTheLastBatch(TrainerCallback):
    """Stops between two batches of the second step, whose micro-batches then never run."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == 1


def test_a_step_that_a_callback_stopped_is_not_counted(tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    one_step = mbp_trainer(classifier(), class_rows(), tmp_path, max_steps=1, **options).train()
    stopped = mbp_trainer(
        classifier(), class_rows(), tmp_path, max_steps=2, callbacks=[StopBeforeTheLastBatch()], **options
    ).train()
    assert stopped.global_step == 1
    assert {key: stopped.metrics[key] for key in ("mbp_tokens", "mbp_cells")} == {
        key: one_step.metrics[key] for key in ("mbp_tokens", "mbp_cells")
    }


class StopAfterTheFirstPass(TrainerCallback):
    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = True


def test_rows_that_one_run_left_over_do_not_enter_the_next(tmp_path: Path) -> None:
    """A stream that ends inside a step leaves rows that wait for the next step of the same run."""
    rows = class_rows()[:15]
    trainer = mbp_trainer(
        classifier(),
        Stream(rows),
        tmp_path,
        per_device_train_batch_size=5,
        gradient_accumulation_steps=2,
        max_steps=5,
        callbacks=[StopAfterTheFirstPass()],
    )
    for _ in range(2):
        assert trainer.train().metrics["mbp_tokens"] == sum(len(row["input_ids"]) for row in rows[:10])


def test_log_keys(tmp_path: Path) -> None:
    recorder = Recorder()
    trainer = mbp_trainer(classifier(), class_rows(), tmp_path, max_steps=2, callbacks=[recorder])
    metrics = trainer.train().metrics
    keys = {"micro_batches", "padding_fraction", "tokens_per_second", "max_tokens", "peak_memory_bytes", "oom_retries"}
    logged = recorder.logs[0]
    assert {f"mbp_{key}" for key in keys} <= logged.keys()
    useful = sum(len(row["input_ids"]) for row in class_rows())
    assert logged["mbp_max_tokens"] == 64
    assert logged["mbp_tokens"] == useful
    assert logged["mbp_padding_fraction"] == pytest.approx(1 - useful / logged["mbp_cells"])
    assert logged["mbp_tokens_per_second"] > 0
    assert logged["mbp_peak_memory_bytes"] > 2**20
    assert metrics["mbp_tokens"] == 2 * useful
    widest = max(len(row["input_ids"]) for row in class_rows())
    assert metrics["mbp_padding_fraction_unsplit"] == pytest.approx(1 - useful / (16 * widest))


def test_the_next_class_may_log_nothing(tmp_path: Path) -> None:
    class Quiet(Trainer):
        def log(self, logs: Any, *args: Any) -> None:
            """As on all ranks but one."""

    class MBPQuiet(MBPMixin, Quiet):
        pass

    trainer = mbp_trainer(classifier(), class_rows(), tmp_path, trainer_class=MBPQuiet)
    trainer.train()
    assert trainer.state.global_step == 1
    assert trainer.state.log_history == []


def test_the_start_line_says_what_will_happen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mbp_trainer(classifier(), class_rows(), tmp_path, max_steps=2).train()
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("hf_mbp:")]
    assert len(lines) == 1
    for words in ("16 rows a step run as", "at most 64 tokens each, as asked", "Padding", "Checked to be exact"):
        assert words in lines[0]


def test_a_row_longer_than_the_budget_runs_alone_and_is_warned_about_once(tmp_path: Path) -> None:
    rows = class_rows()
    longest = max(len(row["input_ids"]) for row in rows)
    model = classifier()
    expected = whole_gradients(model, lambda m: m(**Pad()(rows)).loss)[1]
    trainer = mbp_trainer(model, rows, tmp_path, max_tokens_per_micro_batch=longest - 1, max_steps=2)
    recorder = Recorder()
    trainer.add_callback(recorder)
    with pytest.warns(UserWarning, match=f"A row of {longest} tokens") as caught:
        trainer.train()
    assert len([warning for warning in caught if "A row of" in str(warning.message)]) == 1
    assert relative_error(expected, recorder.gradients[0]) < IN_FLOAT64


class SeveralGpus(TrainingArguments):
    @property
    def n_gpu(self) -> int:
        return 2


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "max_tokens": ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch must be a positive integer"),
    "memory": ({"memory_limit": "plenty"}, "memory_limit='plenty' is neither a size nor a fraction"),
    "on_inexact": ({"on_inexact": "ignore"}, "on_inexact='ignore' is unknown"),
    "lomo": ({"optim": "lomo"}, "optim='lomo'.*during the backward pass"),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, "optim='galore_adamw_layerwise'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_work_is_refused(case: str, tmp_path: Path) -> None:
    changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        mbp_trainer(classifier(), class_rows(), tmp_path, **changes)


def test_several_gpus_in_one_process_are_refused(tmp_path: Path) -> None:
    args = SeveralGpus(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"2 GPUs in one process.*accelerate launch"):
        MBPTrainer(model=classifier(), args=args, train_dataset=class_rows(), data_collator=Pad())


def test_an_empty_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="train_dataset is empty"):
        mbp_trainer(classifier(), [], tmp_path).train()


def test_the_options_must_be_a_config(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="mbp_config must be an MBPConfig, got dict"):
        MBPTrainer(model=classifier(), args=arguments(tmp_path), mbp_config={"max_tokens_per_micro_batch": 64})


def test_collators_may_take_things_out_of_rows(tmp_path: Path) -> None:
    def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row.pop("labels") for row in rows])
        return {**Pad()(rows), "labels": labels}

    trainer = mbp_trainer(classifier(), class_rows(), tmp_path, data_collator=collate, max_tokens_per_micro_batch=None)
    assert trainer.train().global_step == 1


def test_a_count_that_is_no_number_is_refused(tmp_path: Path) -> None:
    class Forgetful(MBPTrainer):
        def num_items(self, micro_batch: Any) -> Any:
            return None

    with pytest.raises(ValueError, match="num_items\\(micro_batch\\) must return a number"):
        mbp_trainer(classifier(), class_rows(), tmp_path, trainer_class=Forgetful).train()


def test_batches_of_an_own_loader_must_be_dictionaries(tmp_path: Path) -> None:
    class OwnLoader(MBPTrainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(class_rows(), batch_size=16, collate_fn=lambda rows: (torch.ones(1), torch.ones(1)))

    with pytest.raises(TypeError, match="a batch must be a dictionary"):
        mbp_trainer(classifier(), class_rows(), tmp_path, trainer_class=OwnLoader).train()


def test_numpy_integers_make_a_budget_that_a_checkpoint_can_keep(tmp_path: Path) -> None:
    budget = np.int64(64)
    trainer = mbp_trainer(
        classifier(), class_rows(), tmp_path, max_tokens_per_micro_batch=budget, save_strategy="steps", save_steps=1
    )
    trainer.train()
    assert (tmp_path / "checkpoint-1" / "trainer_state.json").is_file()


class LooksInside(MBPTrainer):
    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return super().training_step(model, {"labels": inputs["labels"]}, num_items_in_batch)


def test_a_training_step_below_the_mixin_is_told_what_to_override(tmp_path: Path) -> None:
    trainer = mbp_trainer(classifier(), class_rows(), tmp_path, trainer_class=LooksInside)
    with pytest.raises(TypeError, match="Override compute_loss, which gets each of them"):
        trainer.train()


def test_a_mixin_behind_the_trainer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Put MBPMixin before the trainer: class Late\(MBPMixin, Trainer\)"):
        type("Late", (Trainer, MBPMixin), {})
