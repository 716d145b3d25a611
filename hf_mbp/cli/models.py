"""Loading a tokenizer and a model, from the Hub, a folder or an installed package, GGUF included."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import ModelArguments, ModelShape
from hf_mbp.cli.errors import UserError, say, user_errors
from hf_mbp.cli.sources import resolve_model

# Tokenizers that know no limit state a number like 1e30.
_NO_LIMIT = 10**9


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Load the model's configuration."""
    name = _model_name(arguments)
    with user_errors(f"model {name} cannot be loaded"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(resolve_model(name), **_hub_options(arguments))
    return config


def load_tokenizer(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token, and with what the model can read as its ``model_max_length``."""
    name = arguments.tokenizer_name or _model_name(arguments)
    options = _hub_options(arguments)
    if arguments.tokenizer_name is not None:
        options = {"trust_remote_code": arguments.trust_remote_code}  # revision and gguf_file are the model's
    with user_errors(f"tokenizer of {name} cannot be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model(name), **options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"tokenizer of {name} has neither a padding nor an end token; set pad_token in its files")
        # Safe, because padding is told by the attention mask and labels are never masked by token.
        tokenizer.pad_token = tokenizer.eos_token
        say(f"the tokenizer has no padding token; {tokenizer.eos_token!r} pads")
    positions = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def load_model(auto_class: Any, arguments: ModelArguments, **options: Any) -> PreTrainedModel:
    """Load the weights with one of the ``AutoModelFor...`` classes.

    GGUF weights are de-quantized: as quantized ones they could not be trained. Of a :class:`ModelShape` nothing is
    loaded.
    """
    if isinstance(arguments, ModelShape):
        return _without_weights(auto_class, arguments, **options)
    name = _model_name(arguments)
    options["dtype"] = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if arguments.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    with user_errors(f"model {name} cannot be loaded", (ValueError, OSError, ImportError)):
        model: PreTrainedModel = auto_class.from_pretrained(resolve_model(name), **_hub_options(arguments), **options)
    return model


def _without_weights(
    auto_class: Any, arguments: ModelShape, *, ignore_mismatched_sizes: bool = False, **changes: Any
) -> PreTrainedModel:
    """A model made from its configuration, with parameters on the meta device."""
    del ignore_mismatched_sizes  # there are no weights that could have another size
    config = load_config(arguments)
    for name, value in changes.items():
        setattr(config, name, value)
    stored = getattr(config, "dtype", None) or torch.float32
    options: dict[str, Any] = {"dtype": stored if arguments.dtype == "auto" else getattr(torch, arguments.dtype)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    with torch.device("meta"), user_errors(f"model {_model_name(arguments)} cannot be made", (ValueError, ImportError)):
        model: PreTrainedModel = auto_class.from_config(
            config, trust_remote_code=arguments.trust_remote_code, **options
        )
    return model


def with_adapters(model: PreTrainedModel, arguments: ModelArguments, adapters: Any) -> Any:
    """Return the model as it is trained, where it only has its shape; else as it is: trainers put adapters in."""
    if adapters is None or not isinstance(arguments, ModelShape):
        return model
    from peft import get_peft_model

    with torch.device("meta"), user_errors(f"model {_model_name(arguments)} cannot have adapters"):
        return get_peft_model(model, adapters)


def length_limit(tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> int | None:
    """Return after how many tokens to cut a row: ``max_length``, or what the model can read, or ``None`` for no limit.

    Raises:
        UserError: ``max_length`` is more than the model can read.
    """
    readable = tokenizer.model_max_length
    if max_length is not None and max_length > readable:
        raise UserError(
            f"max_length is {max_length}, but the model reads at most {readable} tokens; write a smaller number"
        )
    return max_length or (readable if readable < _NO_LIMIT else None)


def _model_name(arguments: ModelArguments) -> str:
    if arguments.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: a model on the Hub, a folder, or package://NAME/FOLDER")
    return arguments.model_name_or_path


def _hub_options(arguments: ModelArguments) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code, "revision": arguments.model_revision}
    if arguments.gguf_file is not None:
        options["gguf_file"] = arguments.gguf_file
    return options
