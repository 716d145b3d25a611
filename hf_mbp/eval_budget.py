"""The budget of evaluation where no run of training has settled one: what predictions take, measured on the rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from hf_mbp import memory
from hf_mbp.byte_sizes import parse_memory_limit
from hf_mbp.collate import Inputs, num_rows_of
from hf_mbp.eval_batch import EvalBatch
from hf_mbp.fit import Measured, fit_budget
from hf_mbp.out_of_memory import unless_out_of_memory
from hf_mbp.padding import can_be_cut, cut_columns, with_padding
from hf_mbp.plan import Budget
from hf_mbp.row_outputs import num_bytes
from hf_mbp.sizing import probe_shapes

COPIES = 3
"""Of a batch's outputs on the host: as they are filled in, and the two that stock has when it concatenates batches."""


def inference_budget(trainer: Any, batch: EvalBatch, run: Callable[[Inputs], Any]) -> Budget:
    """The budget that the free memory allows for a batch, from what small micro-batches of its longest row take.

    Activations are freed layer by layer, but logits have an entry for each word of the vocabulary. On a CPU the
    outputs of the whole batch take memory beside them. Where no memory is left rows run one by one: an evaluation
    before training leaves it to the training to refuse. All but the smallest may run out of it, and are then left out.

    Args:
        trainer: has the options and the device.
        batch: the first one.
        run: a prediction step, which returns its outputs on the host.
    """
    lengths = batch.sizes(cuts=batch.is_cuttable).sum(axis=1)
    example = int(lengths.argmax())
    measured: list[Measured] = []
    per_cell = 0.0
    for inputs in _samples(batch, example, int(lengths[example])):
        num_rows = num_rows_of(inputs) // batch.rows_each
        cells = replace(batch, inputs=inputs).cells
        outputs: list[Any] = []
        measure = partial(memory.measure_activations, partial(_run, run, inputs, outputs))
        size = unless_out_of_memory(measure) if measured else measure()
        if size is None:
            continue
        measured.append((num_rows, -(-cells // num_rows), size))
        per_cell = max(per_cell, num_bytes(outputs) / cells)
    room = _room(trainer)
    if trainer.args.device.type == "cpu":
        room = max(1, room - int(COPIES * per_cell * int(lengths.max()) * batch.num_examples))
    budget = fit_budget(measured, room)
    return replace(budget, max_tokens=trainer.mbp_config.max_tokens_per_micro_batch)


def _room(trainer: Any) -> int:
    limit = parse_memory_limit(trainer.mbp_config.memory_limit)
    try:
        return memory.room_for_training(trainer.args.device, limit, 0).activation_bytes
    except ValueError:  # nothing is left
        return 1


def _run(run: Callable[[Inputs], Any], inputs: Inputs, outputs: list[Any]) -> None:
    outputs.append(run(dict(inputs)))


def _samples(batch: EvalBatch, example: int, length: int) -> list[Inputs]:
    """A row repeated, at several widths if it can be cut; the shapes in which training is measured."""
    inputs = batch.take([example] * 2, cuts=batch.is_cuttable)
    is_cut = batch.rows_each == 1 and can_be_cut(inputs) and num_rows_of(inputs) == 2
    fitted, held_out = probe_shapes(length, is_cut=is_cut)
    samples = []
    for num_rows, width in (*fitted, held_out):
        inputs = batch.take([example] * num_rows, cuts=batch.is_cuttable)
        samples.append(with_padding(cut_columns(inputs, width)) if is_cut else inputs)
    return samples
