"""Training mode without dropout: what exists in training mode only is run, and two calls give one loss."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

RATES = ("drop", "jitter", "neftune")
"""Parts of the names of numbers by which models leave out, or blur, at random: `attention_dropout`, `layerdrop`,
`drop_prob` (stochastic depth), `router_jitter_noise`, `neftune_noise_alpha`. At zero they do nothing. Attention by
other packages than torch gets its dropout from them."""

DROPOUTS: frozenset[Callable[..., Any]] = frozenset(
    getattr(owner, name)
    for owner in (functional, torch)
    for kind in ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout")
    for name in (kind, f"{kind}_", kind.replace("alpha", "feature_alpha"), f"{kind.replace('alpha', 'feature_alpha')}_")
    if hasattr(owner, name)
)
"""Functions that return their input where nothing is dropped."""

PLACE_OF_RATE: dict[Callable[..., Any], int] = {
    functional.scaled_dot_product_attention: 4,
    functional.multi_head_attention_forward: 10,
}
"""Where functions that do something else besides take `dropout_p`."""


class WithoutDropout(TorchFunctionMode):
    """Makes torch's dropout functions return their input, for models that read the rate from their configuration."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in DROPOUTS:
            return args[0] if args else kwargs["input"]
        place = PLACE_OF_RATE.get(func)
        if place is not None and len(args) > place:
            args = (*args[:place], 0.0, *args[place + 1 :])
        elif place is not None:
            kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def training_mode_without_dropout(model: torch.nn.Module, others: list[torch.nn.Module]) -> Iterator[None]:
    """Training mode of `model`, without dropout in it and in other models; to be used inside of `undisturbed`.

    Activations are not checkpointed: on a GPU they would be computed again by a thread that knows nothing of this.
    """
    model.train()
    for module in model.modules():  # not of a loss, which may leave out rows by a rule of its own
        _zero_rates(module)
        if hasattr(config := vars(module).get("config"), "__dict__"):
            _zero_rates(config)
    for module in dict.fromkeys(module for held in [model, *others] for module in held.modules()):
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            module.p = 0.0
        if vars(module).get("gradient_checkpointing"):
            vars(module)["gradient_checkpointing"] = False
    with WithoutDropout():
        yield


def _zero_rates(owner: Any) -> None:
    for name, value in vars(owner).items():
        if isinstance(value, float) and any(part in name for part in RATES):
            vars(owner)[name] = 0.0


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, except for batch normalisation, whose dependence on the batch is not to be hidden."""
    model.train()
    normalised_by_batch = batch_norms_of(model)
    model.eval()
    for module in normalised_by_batch:
        module.train()
    yield


def batch_norms_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Batch normalisations that use the mean of the batch that runs."""
    kinds = torch.nn.modules.batchnorm._BatchNorm
    return [module for module in model.modules() if isinstance(module, kinds) and module.training]
