"""Evaluation and prediction under the budget: each batch runs in micro-batches, and looks to stock as if it had not.

    1. before the first batch a few of its rows are tried together and apart: what may be split, what may be cut
    2. each batch is planned like a mini-batch: rows sorted by length, cut into groups under the budget
    3. one group after the other runs through the next class's `prediction_step`; its outputs go to the host at once
    4. outputs in the order of rows and the mean of the losses are handed to the stock loop, which does the rest

What the loop makes of a batch (gathering, padding with -100, metrics) is stock's.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from hf_mbp import compat, device_memory, other_trainers, wrapped
from hf_mbp.call_metrics import CallMetrics
from hf_mbp.collate import Inputs, count_cells
from hf_mbp.distributed import Ranks
from hf_mbp.eval_batch import EvalBatch
from hf_mbp.eval_budget import inference_budget
from hf_mbp.eval_trial import CountEffect, EvalTraits, EvalTrial, Result, Run
from hf_mbp.out_of_memory import give_back_memory, is_out_of_memory
from hf_mbp.padding import IGNORE_INDEX
from hf_mbp.plan import Budget, Cost
from hf_mbp.probe import modules_of
from hf_mbp.random_numbers import own_random_numbers
from hf_mbp.row_outputs import RowOutputs, to_device
from hf_mbp.sizing import cost_of
from hf_mbp.step import MicroBatch, RowFunctions, collate_groups, split_mini_batch
from hf_mbp.undisturbed import kept_notes

NOT_SPLIT = (
    "Evaluation batches run whole: two rows had other predictions, or another loss, together than apart. That is so "
    "where rows are compared with each other, or where the loss is no mean over what num_items counts: override "
    "num_items if it has weights. Choose a per_device_eval_batch_size that fits."
)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Some examples of a batch and the micro-batch that they make."""

    examples: list[int]
    micro_batch: MicroBatch


class Evaluation:
    """Splits the evaluation batches of one trainer."""

    def __init__(self, trainer: Any, ranks: Ranks) -> None:
        self._trainer = trainer
        self._ranks = ranks
        self._metrics = CallMetrics(trainer, ranks, mode="eval")
        self._is_warned = False
        self._is_in_loop = False
        self._is_recognised = False
        self._found_for: tuple[Any, ...] = ()
        self._preprocess: Callable[[Any, Any], Any] | None = None
        self.restart()

    def restart(self) -> None:
        """Forgets what was found out about data, model and memory."""
        self._traits: EvalTraits | None = None
        self._effect: CountEffect | None = None
        self._budget: Budget | None = None
        self._costs: dict[bool, Cost] = {}
        self._is_compiled = wrapped.compiles(self._trainer.accelerator, self._trainer.model)

    @contextmanager
    def loop(self) -> Iterator[None]:
        """Around the stock loop: logits are preprocessed, and gathered tensors brought to the host, batch by batch."""
        device_memory.keep_address_space_free()
        trainer = self._trainer
        self._is_recognised = False
        self._preprocess, gather = trainer.preprocess_logits_for_metrics, trainer.gather_function
        self._is_in_loop = True
        trainer.gather_function = lambda tensors: to_device(gather(tensors), "cpu")
        try:
            with compat.replaced(trainer, preprocess_logits_for_metrics=None):
                yield
        finally:
            trainer.gather_function = trainer.accelerator.gather_for_metrics  # as stock leaves it
            self._preprocess, self._is_in_loop = None, False

    def step(self, run: Run, inputs: Any, *, prediction_loss_only: bool) -> Result:
        """Loss, logits and labels of a batch, as `run`, the next class's `prediction_step`, would return them."""
        compares_rows = self._trainer.mbp_two_passes or other_trainers.is_sentence_transformers(self._trainer)
        if compares_rows or not isinstance(inputs, Mapping):
            return self._whole(run, inputs)
        batch = EvalBatch(
            inputs=dict(inputs),
            has_targets=self._trainer.mbp_rows.has_targets,
            multiple_of=self._trainer.mbp_rows.multiple_of or 1,
            rows_each=other_trainers.rows_each(self._trainer),
        )
        generates = bool(getattr(self._trainer.args, "predict_with_generate", False)) and not prediction_loss_only
        if not (self._is_in_loop and self._is_recognised):
            self._recognise(batch, generates, prediction_loss_only)
        if self._traits is None or self._ranks.highest(int(self._traits.leaves_open(batch))):
            self._traits = self._found_out(run, batch, generates=generates)
        if not self._traits.preprocesses and (self._traits.splits or self._ranks.count > 1):
            self._leave_preprocessing()
        if not self._traits.splits:
            return self._whole(run, inputs)
        return self._split(run, batch, self._traits, generates=generates)

    def _recognise(self, batch: EvalBatch, *how: bool) -> None:
        """Keeps what was found out for batches such as this one and the weights as they are; or forgets it.

        Evaluations one after the other, of several data sets, find it out once.
        """
        trainer = self._trainer
        functions = [trainer.data_collator, self._preprocess, trainer.compute_loss_func]
        found_for = (
            *(weakref.ref(trainer.model), wrapped.version(trainer.model), trainer.state.global_step),
            *(trainer.mbp_config, frozenset(batch.inputs), *how, *map(id, functions)),
        )
        if not self._ranks.lowest(float(found_for == self._found_for)):
            self.restart()
        self._found_for, self._functions, self._is_recognised = found_for, functions, True  # or others get their ids

    def _found_out(self, run: Any, batch: EvalBatch, *, generates: bool) -> EvalTraits:
        """What may be split and cut; by the loss alone where tokens are generated, which takes as long for two rows."""
        tried = partial(run, loss_only=True) if generates else run
        self._trial = EvalTrial(self._trainer, self._ranks, tried, self._preprocess, self._num_items)
        if generates and "labels" not in batch.inputs:
            all_parts = frozenset(range(batch.sizes(cuts=False).shape[1]))
            traits = EvalTraits(splits=True, cuts=batch.has_targets, tried_parts=all_parts)
        else:
            with wrapped.eagerly(self._is_compiled):
                traits = self._trial.traits(batch, self._traits)
        if generates:  # a decoder alone goes on behind the padding; and this prediction step counts no items
            cuts = traits.cuts and batch.has_targets
            traits = replace(traits, cuts=cuts, preprocesses=False, follows=[set(), set()], is_counted=False)
        if not traits.splits and batch.is_splittable and not self._is_warned:
            self._is_warned = True
            warnings.warn(NOT_SPLIT, stacklevel=2)
        return traits

    def _leave_preprocessing(self) -> None:
        """Lets the stock loop preprocess logits, of whole batches."""
        if self._preprocess is not None:
            self._trainer.preprocess_logits_for_metrics, self._preprocess = self._preprocess, None

    def _whole(self, run: Run, inputs: Any) -> Result:
        """As stock does it, but that outputs go to the host."""
        loss, logits, labels = run(inputs)
        if self._preprocess is not None and logits is not None:
            logits = self._preprocess(logits, labels)
        return loss, self._handed_over(logits), self._handed_over(labels)

    def _handed_over(self, outputs: Any) -> Any:
        """Outputs where the stock loop can take them: ranks gather what is on their devices."""
        stays = self._is_in_loop and self._ranks.count == 1
        return to_device(outputs, "cpu" if stays else self._trainer.args.device)

    # A batch that is split

    def _split(self, run: Run, batch: EvalBatch, traits: EvalTraits, *, generates: bool) -> Result:
        cuts, beams = traits.cuts_of(batch), compat.num_beams(self._trainer) if generates else 1
        cutting = _Cutting(batch, self._num_items, cuts=cuts, beams=beams)
        groups = self._groups(run, cutting, generates=generates)
        if self._ranks.count == 1 and len(groups) == 1 and _is_whole(groups[0], batch):
            return self._whole(run, batch.inputs)
        fill = compat.pad_token_of_generation(self._trainer) if generates else IGNORE_INDEX
        outputs = RowOutputs(batch.num_examples, fill=fill, follows=traits.follows)
        losses, counts = [], []
        run = compat.same_generation(self._trainer, run) if generates else run
        for group, (loss, *predictions) in self._results(run, cutting, groups):
            if group.micro_batch.num_rows:
                losses.append(loss)
                counts.append(group.micro_batch.num_items)
                inputs = group.micro_batch.inputs
                outputs.put(tuple(predictions), group.examples, batch.widths(inputs), batch.widths(batch.inputs))
        self._metrics.merge()
        logits, labels = outputs.value
        if generates and isinstance(labels, torch.Tensor):  # of which each micro-batch has padded its part
            given = batch.inputs["labels"].cpu()
            labels[:, : given.shape[1]] = given
        loss = self._mean(losses, counts, self._factor(batch, sum(counts)) if traits.is_counted else 1.0)
        return loss, self._handed_over(logits), self._handed_over(labels)

    def _groups(self, run: Run, cutting: "_Cutting", *, generates: bool) -> list[Group]:
        """The micro-batches of a batch, the longest first; ranks have equally many, as their losses may gather."""
        micro_batches = split_mini_batch(
            list(range(cutting.batch.num_examples)),
            cutting.sizes,
            budget=self._budget_for(run, cutting.batch),
            cost=self._cost_of_model(generates=generates),
            functions=cutting.functions,
            ranks=self._ranks,
        )
        groups = [cutting.group(micro_batch) for micro_batch in micro_batches]
        filler = Group(examples=[], micro_batch=replace(micro_batches[-1], num_rows=0, num_items=0.0))
        return groups + [filler] * (self._ranks.highest(len(groups)) - len(groups))

    def _results(self, run: Run, cutting: "_Cutting", groups: list[Group]) -> Iterator[tuple[Group, Result]]:
        """What each group gives; one that there is no memory for is halved, and so are those of the next batches."""
        waiting = groups[::-1]
        while waiting:
            group = waiting.pop()
            result = self._attempted(run, group)
            if result is not None:
                yield group, result
                continue
            give_back_memory()
            budget = self._budget_for(run, cutting.batch)
            self._budget = replace(budget, max_tokens=max(1, group.micro_batch.cells // 2))
            waiting += cutting.halves(group)[::-1]

    def _attempted(self, run: Run, group: Group) -> Result | None:
        """Loss and outputs, on the host; `None` if memory ran out and fewer rows may fit.

        Returned and not raised: the frames that an exception holds on to keep the tensors alive.
        """
        try:
            return self._run(run, group.micro_batch, self._metrics)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or len(group.examples) < 2 or wrapped.is_sharded(self._trainer):
                raise
        return None

    def _run(self, run: Run, micro_batch: MicroBatch, metrics: CallMetrics) -> Result:
        with (
            metrics.call(micro_batch),
            compat.mean_loss(self._trainer, micro_batch.num_items, varies=self._is_compiled),
        ):
            loss, logits, labels = run(dict(micro_batch.inputs))
        if self._preprocess is not None and logits is not None:
            logits = self._preprocess(logits, labels)
        return loss, to_device(logits, "cpu"), to_device(labels, "cpu")

    def _mean(self, losses: list[Any], counts: list[float], factor: float) -> torch.Tensor | None:
        """The mean of the losses over their items, times a factor; what the last one is where there are no items."""
        if losses[0] is None:
            return None
        learned = [(float(loss.mean()), count) for loss, count in zip(losses, counts, strict=True) if count]
        learned = learned or [(float(losses[-1].mean()), 1.0)]
        mean = sum(loss * count for loss, count in learned) / sum(count for _, count in learned)
        return torch.full_like(losses[0].mean(), mean * factor)

    def _factor(self, batch: EvalBatch, num_items: float) -> float:
        """What the loss of the whole batch is of the mean over its items: stock counts them in its own way."""
        count = compat.stock_count(self._trainer, batch.inputs)
        if count is None or (self._ranks.count == 1 and count == num_items):
            return 1.0
        self._effect = self._effect or self._trial.count_effect(batch)
        return self._effect.factor(num_items, count)

    # What has to be known

    def _num_items(self, inputs: Inputs) -> float:
        return float(self._trainer.mbp_rows.num_items(inputs))

    def _cost_of_model(self, *, generates: bool) -> Cost:
        """Of a forward pass; where each token that is generated launches another one, the dearer one of training."""
        if generates not in self._costs:
            trainer = self._trainer
            self._costs[generates] = cost_of(trainer.model, trainer.args.device, forward_only=not generates)
        return self._costs[generates]

    def _budget_for(self, run: Run, batch: EvalBatch) -> Budget:
        """As asked, that of training, which needs more memory, or measured; a sharded model cannot be measured."""
        if self._budget is None:
            config = self._trainer.mbp_config
            if config.max_tokens_per_micro_batch is not None and config.memory_limit is None:
                self._budget = Budget(max_tokens=config.max_tokens_per_micro_batch)
            else:
                self._budget = self._trainer.mbp_feed.budget.settled or self._measured(run, batch)
        return self._budget

    def _measured(self, run: Run, batch: EvalBatch) -> Budget:
        if wrapped.is_sharded(self._trainer) or not batch.is_splittable:
            return Budget(max_tokens=self._trainer.mbp_config.max_tokens_per_micro_batch)

        def predict(inputs: Inputs) -> Any:
            micro_batch = MicroBatch(inputs=inputs, num_rows=1, num_items=1.0, cells=0, tokens=0)
            again = compat.same_generation(self._trainer, run, leaves_it=True)
            with kept_notes(self._trainer), own_random_numbers(modules_of(self._trainer)):
                return self._run(again, micro_batch, CallMetrics(self._trainer, self._ranks, mode="eval"))

        return inference_budget(self._trainer, batch, predict)


class _Cutting:
    """Takes micro-batches out of one batch, and remembers which examples each is made of."""

    def __init__(self, batch: EvalBatch, num_items: Callable[[Inputs], float], *, cuts: bool, beams: int) -> None:
        self.batch = batch
        self._cuts = cuts
        self.sizes = batch.sizes(cuts=cuts) * beams
        self._beams = beams
        self._examples: dict[int, list[int]] = {}
        self.functions = RowFunctions(collate=self._collate, num_items=num_items, num_cells=self._num_cells)

    def _collate(self, groups: list[list[int]]) -> list[Inputs]:
        taken = [self.batch.take(group, cuts=self._cuts) for group in groups]
        self._examples |= {id(inputs): group for inputs, group in zip(taken, groups, strict=True)}
        return taken

    def _num_cells(self, inputs: Inputs) -> int | None:
        cells = count_cells(inputs, with_targets=self.batch.has_targets)
        return None if cells is None else cells * self._beams

    def group(self, micro_batch: MicroBatch) -> Group:
        """A micro-batch with the examples that it is made of."""
        return Group(examples=self._examples[id(micro_batch.inputs)], micro_batch=micro_batch)

    def halves(self, group: Group) -> list[Group]:
        """The examples of a group in two groups."""
        half = len(group.examples) // 2
        parts = [group.examples[:half], group.examples[half:]]
        examples = list(range(self.batch.num_examples))
        return [self.group(part) for part in collate_groups(examples, self.sizes, parts, Budget(), self.functions)]


def _is_whole(group: Group, batch: EvalBatch) -> bool:
    return batch.widths(group.micro_batch.inputs) == batch.widths(batch.inputs)
