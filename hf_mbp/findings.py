"""Explains why splitting is not exact, and what to do: each suspect is tried on the user's own rows."""

from collections.abc import Callable
from math import isclose

import torch

from hf_mbp.collate import select_rows
from hf_mbp.comparison import Comparison, Difference
from hf_mbp.padding import is_left_padded

SHOWN = 4
"""Names or numbers of a kind that a finding shows."""

NOTHING_ALONE = 1e-3
"""Share of a batch's loss below which a row that is alone has none."""


def explain(comparison: Comparison, difference: Difference) -> list[str]:
    """What makes splitting inexact, and what to do."""
    if finding := _not_a_number(comparison) or _random(comparison) or _batch_norm(comparison):
        return [finding]  # the others would only be misled, or run single rows
    suspects: list[Callable[[Comparison], str | None]] = [_changing_state, _router_loss, _padding_width]
    if not _router_loss(comparison):  # with which no count could explain the loss
        suspects.append(_reduction)
    return [finding for suspect in suspects if (finding := suspect(comparison))] or [_unexplained(difference)]


def _not_a_number(comparison: Comparison) -> str | None:
    if comparison.is_finite:
        return None
    return (
        "The loss of these rows, or its gradient, is not a finite number, split or not. Look for weights that are not "
        "finite, and for labels that the loss cannot take."
    )


def _random(comparison: Comparison) -> str | None:
    """Runs the rows again with other random numbers; those of training mode have been left out by now."""
    if not comparison.varies_at_random():
        return None
    return (
        "The gradient of the same rows differs from one call to the next: model or loss draw random numbers even in "
        "evaluation mode, so whether splitting is exact cannot be told. Draw them in training mode only."
    )


def _batch_norm(comparison: Comparison) -> str | None:
    if comparison.smallest > 1:
        return (
            "Batch normalisation uses the mean of the batch that runs, which after splitting is the micro-batch. "
            "Freeze it (replace it by torchvision.ops.FrozenBatchNorm2d, or override train() of the model so that it "
            "stays in evaluation mode), or use a model with layer normalisation."
        )
    return None


def _changing_state(comparison: Comparison) -> str | None:
    """Runs the rows as often as there are micro-batches, and once more."""
    changed = comparison.drift()
    if changed is None:
        return None
    return (
        f"Each forward pass changes what the next one computes ({_listed(changed)}), as the power iteration of "
        "spectral normalisation does, or an average that is kept; it advances once a micro-batch instead of once a "
        "batch. Freeze that state in training, or update it once a step, in a callback."
    )


def _router_loss(comparison: Comparison) -> str | None:
    configs = [getattr(module, "config", None) for held in comparison.modules for module in held.modules()]
    if any(getattr(config, "output_router_logits", False) for config in configs):
        return (
            "The load-balancing loss of the experts is computed from the tokens that run together, and is not a mean "
            "over items. Set output_router_logits=False, or accept that it balances each micro-batch."
        )
    return None


def _padding_width(comparison: Comparison) -> str | None:
    """Compares one short row at its own width and at the width of the whole batch."""
    if not comparison.is_dense:
        return None
    shortest = len(comparison.rows) - 1
    padded = select_rows(comparison.whole, [shortest])
    (alone,) = comparison.collate([[shortest]])
    if comparison.items(padded) == 0:
        return None
    at_whole_width = comparison.gradients(padded)
    difference = comparison.difference(at_whole_width, comparison.gradients(alone))
    if comparison.passes(difference):
        return None
    finding = (
        f"The loss of a row depends on how wide it is padded (by {difference.error:.0%} of its gradient, alone and "
        "beside longer rows): padding is not left out. "
    )
    if "attention_mask" not in padded:
        return finding + "The collator returns no attention_mask: return one, or pad all rows to one length."
    unmasked = comparison.gradients({**padded, "attention_mask": torch.ones_like(padded["attention_mask"])})
    if comparison.passes(comparison.difference(at_whole_width, unmasked)):
        return finding + (
            "The model ignores attention_mask: its loss is the same without. Make it use the mask, or pad all rows to "
            "one length (padding='max_length')."
        )
    if is_left_padded(comparison.whole):
        return finding + "The rows are padded on the left and positions may be absolute: set padding_side='right'."
    return finding + (
        "If the loss counts tokens by attention_mask and not by labels, override num_items(micro_batch); if the model "
        "mixes padding into the rows (as FNet does), pad all rows to one length."
    )


def _reduction(comparison: Comparison) -> str | None:
    """Finds how the loss puts rows together, from the gradients of single rows and of pairs, all at one width."""
    if not comparison.is_dense:
        return "The loss is not a mean over what num_items(micro_batch) counts: override it to count its items."
    indices = [i for i in range(len(comparison.rows)) if comparison.items(select_rows(comparison.whole, [i])) > 0]
    rows = [select_rows(comparison.whole, [index]) for index in indices]
    single = [comparison.pull(row) for row in rows]
    counts = [comparison.items(row) for row in rows]
    scale = max(1.0, *map(abs, single))

    def explains(value: float) -> bool:
        return abs(value - 1) <= comparison.tolerance * scale

    if explains(sum(value * count for value, count in zip(single, counts, strict=True)) / sum(counts)):
        return None
    if explains(sum(single)):
        return (
            "The loss is a sum over the rows, not a mean. Ask for a mean (for CTC, config.ctc_loss_reduction='mean', "
            "and num_items to return the rows), or divide by num_items_in_batch in your compute_loss."
        )
    if max(abs(comparison.value(row)) for row in rows) <= NOTHING_ALONE * abs(comparison.whole_loss):
        return _COMPARES_ROWS.format(sign="a row alone has none")
    weights = _item_weights(comparison, indices, single, counts)
    if weights and explains(sum(w * value for w, value in zip(weights, single, strict=True)) / sum(weights)):
        found = ", ".join(f"{weight * counts[0]:.4g}" for weight in weights[:SHOWN])
        expected = ", ".join(f"{count:.4g}" for count in counts[:SHOWN])
        return (
            f"The loss is a mean over other items than num_items(micro_batch) counts: the first rows weigh as {found}, "
            f"but are counted as {expected}. Override num_items to return what the loss divides by; for a "
            "class-weighted cross-entropy that is the sum of the labels' weights."
        )
    if not _is_mean_of_twins(comparison, indices, single):
        return _COMPARES_ROWS.format(sign="the loss of a row twice is not that of the row")
    return _several_means(comparison)


_COMPARES_ROWS = (
    "The loss compares the rows of a batch with each other, as a contrastive loss does: {sign}, and micro-batches have "
    "fewer rows to compare. It cannot be split by rows: define embed_rows and loss_of_embeddings, and it runs in two "
    "passes, or train it unsplit, in sentence-transformers with one of the Cached losses."
)


def _item_weights(
    comparison: Comparison, indices: list[int], single: list[float], counts: list[float]
) -> list[float] | None:
    """Items of each row relative to the first, from pull(pair) = (w1 p1 + w2 p2) / (w1 + w2)."""
    weights = [1.0]
    for index, value, count in zip(indices[1:], single[1:], counts[1:], strict=True):
        pair = comparison.pull(select_rows(comparison.whole, [indices[0], index]))
        if isclose(single[0], value, rel_tol=comparison.tolerance):  # any weights would do
            weights.append(count / counts[0])
        elif pair == value or (single[0] - pair) / (pair - value) <= 0:
            return None
        else:
            weights.append((single[0] - pair) / (pair - value))
    return weights


def _is_mean_of_twins(comparison: Comparison, indices: list[int], single: list[float]) -> bool:
    """Whether a row beside itself goes as far as alone, as by any mean, or sum of means, over rows."""
    twins = (comparison.pull(select_rows(comparison.whole, [index, index])) for index in indices)
    return all(
        isclose(twin, value, rel_tol=comparison.tolerance, abs_tol=comparison.tolerance)
        for twin, value in zip(twins, single, strict=True)
    )


def _several_means(comparison: Comparison) -> str:
    labels = [key for key in comparison.whole if "label" in key or key.endswith("_positions")]
    example = f"here there are {_listed(labels)}" if len(labels) > 1 else "a token loss and a sentence loss, say"
    return (
        f"No count of items explains the loss. It may add up means over different things ({example}), each with a "
        "denominator of its own: compute its parts as one mean in compute_loss, each divided by a count that "
        "num_items(micro_batch) returns. Or it may use a statistic of the rows that run together (a variance, the "
        "load of experts): then train it unsplit."
    )


def _unexplained(difference: Difference) -> str:
    return (
        f"None of the known causes is at work: the losses add up, and the gradient does not, most of all that of "
        f"{difference.parameter}. Look there for a small part of the loss, such as a penalty, that divides by another "
        "count than num_items(micro_batch), or for what acts in the backward pass only: a hook on gradients, or an "
        "autograd function that adds the gradient of an auxiliary loss."
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:SHOWN]) or "what, does not show in its buffers and attributes"
    return shown + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
