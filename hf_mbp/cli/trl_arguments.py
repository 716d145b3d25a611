"""The configurations of TRL as training arguments, without what other options say already. Needs TRL."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import trl

from hf_mbp.cli.arguments import DataArguments, ModelArguments, RunArguments
from hf_mbp.cli.training_arguments import KeepsNoToken
from hf_mbp.config import MBPConfig

_OURS = frozenset(
    field.name for arguments in (RunArguments, ModelArguments, DataArguments, MBPConfig)
    for field in dataclasses.fields(arguments)
)  # fmt: skip
# What TRL would need to load the model and to tokenize; here that is done before.
_LOADING = ("model_init_kwargs", "dataset_num_proc", "truncation_mode", "pad_token")
_SFT_LOADING = ("chat_template_path", "dataset_text_field", "dataset_kwargs", "eos_token", "completion_only_loss")
# What a field holds that is no option, where its default would act on rows that are tokenized and cut already.
_NEUTRAL: Mapping[str, Any] = {"max_length": None}


def _without(name: str, config: type[Any], hidden_names: Iterable[str]) -> type[Any]:
    """A configuration of that name, some of whose fields are no options."""
    hidden = [
        (field.name, field.type, dataclasses.field(default=_NEUTRAL.get(field.name, field.default), init=False))
        for field in dataclasses.fields(config)
        if field.name in hidden_names
    ]
    title = f"training (trl.{config.__name__})"
    namespace = {"_argument_group_name": title, "__module__": __name__}
    return dataclasses.make_dataclass(name, hidden, bases=(KeepsNoToken, config), namespace=namespace)


SFTArguments = _without("SFTArguments", trl.SFTConfig, _OURS.union(_LOADING, _SFT_LOADING))
# DPO's padding_free only warns that it does nothing.
DPOArguments = _without("DPOArguments", trl.DPOConfig, _OURS.union(_LOADING, ("padding_free",)))

CLASSES: Mapping[str, type[Any]] = {"instruction_tuning": SFTArguments, "preference_tuning": DPOArguments}
