"""`MBPTrainer`: the Trainer of transformers, with each mini-batch run in exact micro-batches."""

import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Seq2SeqTrainer, Trainer

from hf_mbp import checkpoints, collate, compat, device_memory, items, loaders, other_trainers, refusals
from hf_mbp.collate import Inputs
from hf_mbp.config import MBPConfig
from hf_mbp.distributed import Ranks
from hf_mbp.evaluation import Evaluation
from hf_mbp.feed import Feed
from hf_mbp.kept import hidden_entries
from hf_mbp.report import MEASURED, StepReport, hidden_loss
from hf_mbp.row_reader import RowReader
from hf_mbp.runner import MicroBatches, Runner
from hf_mbp.two_passes import TwoPasses
from hf_mbp.watch import watched_ranks

if TYPE_CHECKING:
    _Base = Any
else:
    _Base = object


class MBPMixin(_Base):
    """Micro-batch processing for any subclass of `transformers.Trainer`; put it before that class.

    `class MySFT(MBPMixin, trl.SFTTrainer): ...`

    What it overrides, and why:

    * `__init__`: takes `mbp_config`; refuses what cannot be exact.
    * `train`: adds the totals of the run to its metrics; has ranks train together after an evaluation, and end
      together; goes on from whole checkpoints only.
    * `_inner_training_loop`: starts afresh what is found out about model, data and memory.
    * `get_train_dataloader`, `num_examples`: have the loader hand over rows that are not padded yet.
    * `get_batch_samples`: plans and pads the rows of a whole optimizer step.
    * `training_step`: runs the micro-batches, each by the `training_step` of the next class; again, in smaller ones, if
      memory runs out.
    * `prediction_step`, `evaluation_loop`: run evaluation batches in micro-batches, too, and keep what they return on
      the host.
    * `log`, `_maybe_log_save_evaluate`: the `mbp_` entries, and the clock behind them.
    * `_finalize_training`: makes the last loss that of all ranks.
    * `_save_checkpoint`: sees to it that a checkpoint can be told from one that was half written.
    * `_load_callback_state`: hides budget and cost, which a checkpoint keeps among the states of callbacks.
    * `floating_point_ops`, `_track_num_input_tokens`: count what the stock loop asks about a batch.

    What users may override: `num_items` for a loss of their own and `row_length` for rows whose size is not in
    `input_ids`. What they may define, for a loss that compares all rows of a mini-batch: `embed_rows` and
    `loss_of_embeddings` (see `EmbedsRows`).
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Raises `TypeError` if a trainer stands before the mixin, whose methods would then never be called."""
        super().__init_subclass__(**kwargs)
        before = cls.__mro__[: cls.__mro__.index(MBPMixin)]
        trainers = [base.__name__ for base in before if issubclass(base, Trainer) and not issubclass(base, MBPMixin)]
        if trainers:
            raise TypeError(f"Put MBPMixin before the trainer: class {cls.__name__}(MBPMixin, {trainers[0]}).")

    def __init__(self, *args: Any, mbp_config: MBPConfig | None = None, **kwargs: Any) -> None:
        """Takes everything the next class takes, and `mbp_config`.

        Raises:
            ValueError: something asked for is not supported; the message says what to do.
        """
        if mbp_config is not None and not isinstance(mbp_config, MBPConfig):
            raise TypeError(f"mbp_config must be an MBPConfig, got {type(mbp_config).__name__}.")
        self.mbp_config = mbp_config or MBPConfig()
        super().__init__(*args, **kwargs)
        self.mbp_two_passes = self._two_passes()
        refusals.refuse_unsupported(self)
        self._ranks = Ranks(self.accelerator)
        self._report = StepReport()
        self._logs_step = self._has_warned_of_loss = False
        self.mbp_rows = RowReader(self, self._report)
        self.mbp_feed = Feed(self, self.mbp_rows, self._ranks, self._report)
        self._runner = Runner(self, self.mbp_feed, self._ranks, self._report)
        self._evaluation = Evaluation(self, self._ranks)

    def _two_passes(self) -> TwoPasses | None:
        """If the trainer says how rows are embedded and compared, what runs them in two passes, and its loss."""
        if not refusals.embeds_rows(self):
            return None
        two_passes = TwoPasses(self)
        self.compute_loss = two_passes.compute_loss  # of the instance, so that other trainers keep that of their class
        self.can_return_loss = True  # or evaluation would run the model instead
        return two_passes

    # What users may override

    def num_items(self, micro_batch: Mapping[str, Any]) -> float:
        """What the loss averages over, counted in a collated micro-batch on the host.

        Here: labels that are not -100, without the first column if the loss shifts the labels, which is found out by
        trying; rows where there are no labels or they are the float targets of a regression. Override it for a loss
        that divides by something else: the sum of the labels' weights for a class-weighted cross-entropy.
        """
        inputs = dict(micro_batch)
        if self.mbp_two_passes is not None:
            return collate.num_rows_of(inputs)
        if (known := other_trainers.num_items(self, inputs)) is not None:
            return known
        return items.items_of(inputs, getattr(self.model, "config", None), self.mbp_rows.shifts_labels)

    def row_length(self, row: Any) -> int:
        """Tokens of a row of the data set; override it where the size is elsewhere.

        Here: of its `input_ids`, of both sides of a pair, or the frames of its sound; of its texts, by the trainer's
        tokenizer, if the collator is to tokenise them; 1 where there is none of these.
        """
        processor = self.processing_class
        return collate.row_length(row, getattr(processor, "tokenizer", processor))

    # What the stock loop calls

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Trains as the next class does; with `resume_from_checkpoint=True` from the last checkpoint that is whole.

        Raises:
            ValueError: there is nothing to train on, nothing fits the memory limit, or a checkpoint is half written.
        """
        with watched_ranks(self._ranks.count, self.mbp_config.rank_timeout):
            refusals.require_rows(self)
            compat.forget_evaluation(self)
            self._batch_size_before: int | None = None
            checkpoint = checkpoints.resumed_from(resume_from_checkpoint, self.args.output_dir, self._ranks)
            output = super().train(checkpoint, *args, **kwargs)
            output.metrics.update(self._report.totals(self._ranks) | self.mbp_feed.cost.metrics())
        return output

    def _inner_training_loop(self, batch_size: int | None = None, *args: Any, **kwargs: Any) -> Any:
        """One run of the loop; `auto_find_batch_size` runs it again, with fewer rows, after running out of memory."""
        refusals.warn_of_smaller_batch(self._batch_size_before, batch_size)
        self._batch_size_before = batch_size
        device_memory.keep_address_space_free()
        self.mbp_feed.restart()
        self._runner.restart()
        return super()._inner_training_loop(batch_size, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """The stock loader, except that its batches are rows; whoever overrides it may return any batches."""
        with loaders.deferred_collation(self, self.mbp_rows.loader_collator()):
            loader = super().get_train_dataloader()
        refusals.require_batches(self, loader)
        return self.mbp_feed.balanced(loaders.for_all_ranks(loader))

    def num_examples(self, dataloader: Any) -> int:
        """Rows of the data set, also where they are dealt from the first rank."""
        return int(super().num_examples(loaders.source_of(dataloader)))

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> tuple[list[Any], None]:
        """Reads the batches of an optimizer step and returns as many, with their rows grouped into micro-batches."""
        self._report.start_step()
        with self._report.overhead():
            reading = self.mbp_feed.look_ahead.reading(epoch_iterator)
            batches, _ = super().get_batch_samples(reading, num_batches, device)
            batches = self.mbp_feed.as_many_as_others(batches)
            if not batches:
                return [], None
            step = self.mbp_feed.whole_step(batches, num_batches)
            micro_batches = self.mbp_feed.micro_batches(step) if step else []
        return [*(MicroBatches([]) for _ in batches[1:]), MicroBatches(micro_batches)], None

    def training_step(self, model: torch.nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Runs the micro-batches of the step; other inputs run as in the next class."""
        if isinstance(inputs, MicroBatches):
            with self._report.overhead():
                step_loss = self._runner.run(inputs, model, super().training_step)
            if inputs.micro_batches:
                self._report.count_step()
            self._warn_of_hidden_loss(step_loss)
            return step_loss
        loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _warn_of_hidden_loss(self, loss: torch.Tensor) -> None:
        """Once, where stock logs another number in its place; it waits for the device to see this, too.

        Under fp16 an overflow is usual, and its step is left out.
        """
        is_hidden = self.args.logging_nan_inf_filter and self.accelerator.scaler is None
        if is_hidden and not self._has_warned_of_loss and not torch.isfinite(loss):
            self._has_warned_of_loss = True
            warnings.warn(hidden_loss(self.state.global_step + 1, float(loss)), stacklevel=3)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """The stock loop, whose batches `prediction_step` splits."""
        with watched_ranks(self._ranks.count, self.mbp_config.rank_timeout), self._evaluation.loop():
            return super().evaluation_loop(*args, **kwargs)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any, Any]:
        """Loss, logits and labels of a batch, run in micro-batches by the `prediction_step` of the next class."""
        step = super().prediction_step

        def run(part: Any, loss_only: bool = prediction_loss_only) -> Any:
            return step(model, part, loss_only, ignore_keys=ignore_keys, **kwargs)

        return self._evaluation.step(run, inputs, prediction_loss_only=prediction_loss_only)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """The stock logs, with the entries of micro-batch processing beside the training loss.

        Speed and memory go to the callbacks only: `state.log_history`, which is part of a checkpoint, is the same for
        two runs that did the same.
        """
        if self._logs_step and {"loss", "learning_rate"} <= logs.keys():
            logs.update(self._report.flush(self._ranks, device_memory.peak_memory(self.args.device)))
        super().log(logs, *args, **kwargs)
        for entry in self.state.log_history[-1:]:  # there may be none: the next class may log on one rank only
            for name in MEASURED:
                entry.pop(name, None)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Ends the step first: evaluation and saving are not counted, and budget and cost are saved as they are now."""
        with self._report.overhead():
            self.mbp_feed.budget.after_step()
            self.mbp_feed.cost.after_step()
        self._report.stop_clock()
        self._logs_step = True
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._logs_step = False

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """The loss of the steps that were not logged is that of all ranks: what each keeps is its part of it."""
        self._tr_loss: torch.Tensor  # the base's
        self._tr_loss = torch.full_like(self._tr_loss, self._ranks.mean(float(self._tr_loss)))
        return super()._finalize_training(*args, **kwargs)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The stock one; its folder does not count as a checkpoint before the last file is written."""
        folder = compat.checkpoint_folder(self, trial)
        if self.args.should_save:
            checkpoints.begin(folder, self, self._ranks)
        with checkpoints.explained(folder):
            super()._save_checkpoint(model, trial)

    def _load_callback_state(self) -> None:
        """The stock one, which would warn of callbacks that are none: budget and cost lie among their states."""
        with hidden_entries(self):
            super()._load_callback_state()

    def floating_point_ops(self, inputs: Any) -> int:
        """Of all the micro-batches that stand in for a batch."""
        count = super().floating_point_ops
        if not isinstance(inputs, MicroBatches):
            return int(count(inputs))
        with self._report.overhead():
            run = [micro_batch.inputs for micro_batch in inputs.micro_batches if micro_batch.num_rows]
            return compat.operations_of(self.model, count, run)

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Counts once for all the micro-batches of a batch: stock gathers over the ranks at each call."""
        if isinstance(inputs, MicroBatches) and self.args.include_num_input_tokens_seen != "no":
            inputs = _flattened(
                [mb.inputs for mb in inputs.micro_batches if mb.num_rows],
                getattr(self.model, "main_input_name", "input_ids"),
            )
        super()._track_num_input_tokens(inputs)


def _flattened(micro_batches: list[Inputs], main_input_name: str) -> Inputs:
    """Inputs with as many tokens, and as many that are not padding, as all the micro-batches together."""
    keys = [
        key
        for key in (main_input_name, "attention_mask")
        if all(isinstance(inputs.get(key), torch.Tensor) for inputs in micro_batches)
    ]
    return {
        key: torch.cat([inputs[key].reshape(-1) for inputs in micro_batches])
        if micro_batches
        else torch.zeros(0, dtype=torch.long)
        for key in keys
    }


class MBPTrainer(MBPMixin, Trainer):
    """`transformers.Trainer` that fits any batch size into memory, exactly and with little padding.

    Takes everything `Trainer` takes, and `mbp_config`. Choose `per_device_train_batch_size` (times
    `gradient_accumulation_steps`) for the optimisation alone: the rows of an optimizer step are split into
    micro-batches under a token budget, and the gradient is that of the whole batch.

    Example:
        >>> from transformers import BertConfig, BertForSequenceClassification, TrainingArguments
        >>> model = BertForSequenceClassification(
        ...     BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
        ... )
        >>> rows = [{"input_ids": [5] * length, "labels": length % 2} for length in range(2, 34)]
        >>> def pad(rows):
        ...     ids = [torch.tensor(row["input_ids"]) for row in rows]
        ...     ids = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        ...     return {
        ...         "input_ids": ids,
        ...         "attention_mask": (ids != 0).long(),
        ...         "labels": torch.tensor([row["labels"] for row in rows]),
        ...     }
        >>> args = TrainingArguments(
        ...     output_dir=getfixture("tmp_path"), per_device_train_batch_size=32, max_steps=1, report_to="none",
        ...     dataloader_pin_memory=False,
        ... )
        >>> trainer = MBPTrainer(
        ...     model=model, args=args, train_dataset=rows, data_collator=pad,
        ...     mbp_config=MBPConfig(max_tokens_per_micro_batch=128),
        ... )
        >>> metrics = trainer.train().metrics  # doctest: +ELLIPSIS
        hf_mbp: 32 rows a step run as ...
        >>> metrics["mbp_tokens"]
        560
    """


class MBPSeq2SeqTrainer(MBPMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with micro-batch processing; see `MBPTrainer`."""
