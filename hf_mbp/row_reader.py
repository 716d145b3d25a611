"""The rows of a trainer: how long they are, how they become inputs, and what the loss makes of them."""

from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch

from hf_mbp import collate, loaders, other_trainers, padding_free, probe, wrapped
from hf_mbp.arrays import Ints
from hf_mbp.collate import Batch, Inputs, KeepRows
from hf_mbp.items import checked_count
from hf_mbp.plan import Layout, as_sizes, round_up
from hf_mbp.precollated import CollatedRow, CollateInWorkers, cut_out
from hf_mbp.probe import LossFunction, LossTraits
from hf_mbp.report import StepReport


class RowReader:
    """Answers what is asked about the rows of one trainer, by its collator, its model and its loss."""

    def __init__(self, trainer: Any, report: StepReport) -> None:
        self.trainer = trainer
        self.report = report
        self.restart()

    def restart(self) -> None:
        """Forgets what was found out about the loss, and lays rows as usual."""
        self._traits = LossTraits(self.trainer.accelerator)
        self.layout = Layout.PADDED
        self.why_padded: str | None = None

    @property
    def workers_collate(self) -> bool:
        """Whether rows are collated one by one in the workers of the data loader."""
        collates_in = self.trainer.mbp_config.collate_in
        return bool(collates_in == "workers" or other_trainers.is_sentence_transformers(self.trainer))

    def loader_collator(self) -> KeepRows:
        """What the training loader has in place of the user's collator."""
        collator = self.trainer.data_collator
        return CollateInWorkers(collator) if self.workers_collate else KeepRows(collator)

    def sizes(self, rows: list[Any]) -> Ints:
        """Lengths of rows, `[rows, parts]`, as the collator will pad them; two parts for an encoder-decoder."""
        return round_up(as_sizes([self._parts(row) for row in rows]), self.multiple_of)

    def _parts(self, row: Any) -> tuple[int, ...]:
        if isinstance(row, CollatedRow):
            parts = row.parts or (self.trainer.row_length(row.fields()),)
            return (*parts, row.num_targets) if self.has_targets else parts
        length = self.trainer.row_length(row)
        return (length, collate.target_length(row)) if self.has_targets else (length,)

    @property
    def multiple_of(self) -> int | None:
        """What the collator rounds widths up to."""
        return getattr(self.trainer.data_collator, "pad_to_multiple_of", None)

    def collate(self, groups: list[list[Any]], *, keep_width: bool = False) -> list[Inputs]:
        """Each group of rows, padded by the user's collator; all to one width where the loss needs that.

        Rows that were collated in the workers lose the padding that none of their group needs, unless `keep_width`.
        """
        loss, modules = self._loss_and_modules()
        return [self._traits.settled(loss, modules, inputs) for inputs in self.padded(groups, keep_width=keep_width)]

    def arranged(self, inputs: Inputs) -> Inputs:
        """Collated inputs as they run in training: end to end if rows are laid so, and these can be.

        `why_padded` says why some could not.
        """
        if self.layout is Layout.PADDED:
            return inputs
        if reason := padding_free.why_padded(inputs):
            self.why_padded = reason
            return inputs
        return padding_free.laid_end_to_end(
            inputs,
            shifts_labels=self.shifts_labels(inputs),
            gives_boundaries=wrapped.attends_in_segments(self.trainer.model),
        )

    def collate_arranged(self, groups: list[list[Any]]) -> list[Inputs]:
        """Each group of rows as it runs in training."""
        return [self.arranged(inputs) for inputs in self.collate(groups)]

    def padded(self, groups: list[list[Any]], *, keep_width: bool) -> list[Inputs]:
        """The same with the defaults of the loss not yet settled."""
        if isinstance(groups[0][0], CollatedRow):
            return [self._cut_out(group, keep_width=keep_width) for group in groups]
        with self.report.collation():
            return collate.collated(self.trainer.data_collator, groups)

    def _cut_out(self, rows: list[CollatedRow], *, keep_width: bool) -> Inputs:
        return cut_out(
            rows,
            has_targets=self.has_targets,
            multiple_of=self.multiple_of or 1,
            keep_width=keep_width or need_one_width(rows),
        )

    def sample(self, num_rows: int) -> list[Any]:
        """The first rows of the training data, as the collator gets them.

        Raises:
            ValueError: the user's own loader pads its batches itself.
        """
        loader = loaders.source_of(self.trainer.get_train_dataloader())
        batch = self._first_batch(loader, num_rows) if hasattr(loader, "dataset") else None
        if not isinstance(batch, Batch):
            raise ValueError(
                "get_train_dataloader is overridden and returns ready-made batches, which are never split. To have "
                "them split, leave it as it is, or build on super().get_train_dataloader()."
            )
        return batch.unpack()

    def _first_batch(self, loader: Any, num_rows: int) -> Any:
        """What a loader makes of the first rows of its data set."""
        if isinstance(loader.dataset, torch.utils.data.IterableDataset):
            rows = list(islice(loader.dataset, num_rows))
        else:
            rows = [loader.dataset[index] for index in range(min(num_rows, len(loader.dataset)))]
        return loader.collate_fn([row for row in rows if _is_alike(row, rows[0])])

    def shifts_labels(self, inputs: Inputs) -> bool:
        """Whether the loss predicts the next token, so that the first label of a row is no item; found by trying."""
        return self._traits.shifts_labels(*self._loss_and_modules(), inputs)

    def losses(self, *inputs: Inputs) -> list[float]:
        """The mean loss of each of some inputs, from the same state, without dropout."""
        return self._traits.values(*self._loss_and_modules(), *inputs)

    def _loss_and_modules(self) -> tuple[LossFunction, list[torch.nn.Module]]:
        return partial(probe.loss_of, self.trainer), probe.modules_of(self.trainer)

    def num_items(self, inputs: Inputs) -> float:
        """What the trainer's `num_items` says, which users may override.

        Raises:
            ValueError: it is not a number of items.
        """
        return checked_count(self.trainer.num_items(inputs))

    @property
    def has_targets(self) -> bool:
        """Whether rows have a part that the decoder gets, padded by itself."""
        return collate.has_targets(self.trainer.model)

    def num_cells(self, inputs: Mapping[str, Any]) -> int | None:
        """Positions of the batch, padding and all; None where there is no telling."""
        return collate.count_cells(inputs, with_targets=self.has_targets)

    def find_out_together(self, rows: list[Any]) -> None:
        """Tries the loss now, on all ranks alike: a forward pass of a sharded model is a collective."""
        group = sorted(rows, key=lambda row: int(self.sizes([row]).sum()))[:2]
        (inputs,) = self.padded([group], keep_width=False)
        self._traits.find_out(*self._loss_and_modules(), inputs)


def _is_alike(row: Any, other: Any) -> bool:
    """Whether two rows come from one data set, where a trainer of sentence-transformers has several."""
    if not isinstance(row, Mapping):
        return True
    return bool(row.keys() == other.keys() and row.get("dataset_name") == other.get("dataset_name"))


def need_one_width(rows: list[Any]) -> bool:
    """Whether the loss needs all rows of a step padded to one width."""
    first = rows[0]
    return collate.need_one_width(first.batch.inputs if isinstance(first, CollatedRow) else first)
