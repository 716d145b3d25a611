"""Loading a tokenizer or image processor and a model, from the Hub, a folder or an installed package, GGUF included."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import torch
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    GgufConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from hf_mbp.cli.arguments import ModelArguments, ModelShape
from hf_mbp.cli.errors import UserError, say, user_errors
from hf_mbp.cli.sources import resolve_model
from hf_mbp.estimate import tables_of_positions

# Tokenizers that know no limit state a number like 1e30.
_NO_LIMIT = 10**9


def load_config(arguments: ModelArguments) -> PreTrainedConfig:
    """Load the model's configuration."""
    name = _model_name(arguments)
    with user_errors(f"model {name} cannot be loaded ({_options_of_name(arguments)})"):
        config: PreTrainedConfig = AutoConfig.from_pretrained(resolve_model(name), **_hub_options(arguments))
    return config


def load_tokenizer(arguments: ModelArguments, config: PreTrainedConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer, with a padding token, and with what the model can read as its ``model_max_length``."""
    name = arguments.tokenizer_name or _model_name(arguments)
    options = _hub_options(arguments)
    if arguments.tokenizer_name is not None:
        options = {"trust_remote_code": arguments.trust_remote_code}  # revision and gguf_file are the model's
    option = _options_of_name(arguments) if arguments.tokenizer_name is None else "tokenizer_name"
    with user_errors(f"tokenizer of {name} cannot be loaded ({option})"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(resolve_model(name), **options)
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"tokenizer of {name} has neither a padding nor an end token; set pad_token in its files")
        # Safe, because padding is told by the attention mask and labels are never masked by token.
        tokenizer.pad_token = tokenizer.eos_token
        say(f"the tokenizer has no padding token; {tokenizer.eos_token!r} pads")
    positions = getattr(config, "max_position_embeddings", None) or _NO_LIMIT
    if positions < _NO_LIMIT and positions <= tokenizer.model_max_length:  # else the tokenizer knows of fewer
        positions = _places(config, positions)
    tokenizer.model_max_length = min(tokenizer.model_max_length, positions)
    return tokenizer


def _places(config: PreTrainedConfig, stated: int) -> int:
    """How many tokens the positions are for, of which the configuration has stated the number; some are for padding.

    It is made by its class, and not by `AutoModel`, which under ZeRO-3 spreads it over all processes, and of these
    only one is here.
    """
    classes = MODEL_MAPPING.get(type(config), None)
    if classes is None:  # nobody knows better than the configuration
        return stated
    with torch.device("meta"):
        model = (classes[0] if isinstance(classes, (list, tuple)) else classes)(copy.deepcopy(config))
    return min((places for _, size, places in tables_of_positions(model) if size == stated), default=stated)


def load_image_processor(arguments: ModelArguments, config: PreTrainedConfig) -> Any:  # noqa: ARG001 - as the above
    """Load what turns images into pixel values for the model."""
    name = _model_name(arguments)
    options = {"trust_remote_code": arguments.trust_remote_code, "revision": arguments.model_revision}
    with user_errors(
        f"image processor of {name} cannot be loaded ({_options_of_name(arguments)})",
        (ValueError, OSError, ImportError),
    ):
        return AutoImageProcessor.from_pretrained(resolve_model(name), **options)


def load_model(auto_class: Any, arguments: ModelArguments, **options: Any) -> PreTrainedModel:
    """Load the weights with one of the ``AutoModelFor...`` classes, or make random ones, as a ``config_name`` asks.

    GGUF weights are de-quantized: as quantized ones they could not be trained. Of a :class:`ModelShape` nothing is
    loaded.
    """
    if isinstance(arguments, ModelShape) or arguments.config_name is not None:
        return _from_config(auto_class, arguments, **options)
    name = _model_name(arguments)
    options["dtype"] = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if arguments.gguf_file is not None:
        options["quantization_config"] = GgufConfig(dequantize=True)
    elif not arguments.pickled_weights:
        options["use_safetensors"] = True
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    told = f"model {name} cannot be loaded ({_options_of_name(arguments)})"
    with user_errors(told, (ValueError, OSError, ImportError)):
        try:
            model: PreTrainedModel = auto_class.from_pretrained(
                resolve_model(name), **_hub_options(arguments), **options
            )
        except OSError as error:
            raise OSError(f"{str(error).rstrip('.')}{_about_pickles(error, arguments)}") from error
    return model


def _about_pickles(error: OSError, arguments: ModelArguments) -> str:
    """How to go on where there are no weights in safetensors; empty if that is not what is missing."""
    if arguments.pickled_weights or arguments.gguf_file is not None or ".safetensors" not in str(error):
        return ""
    return "; if its weights are in pytorch_model.bin, and you trust who made them, write pickled_weights: true"


def _from_config(
    auto_class: Any, arguments: ModelArguments, *, ignore_mismatched_sizes: bool = False, **changes: Any
) -> PreTrainedModel:
    """A model made from its configuration: with random weights, or, if only its shape is wanted, on the meta device."""
    del ignore_mismatched_sizes  # there are no weights that could have another size
    config = load_config(arguments)
    for name, value in changes.items():
        setattr(config, name, value)
    stored = getattr(config, "dtype", None) or torch.float32
    options: dict[str, Any] = {"dtype": stored if arguments.dtype == "auto" else getattr(torch, arguments.dtype)}
    if arguments.attn_implementation is not None:
        options["attn_implementation"] = arguments.attn_implementation
    device = torch.device("meta") if isinstance(arguments, ModelShape) else nullcontext()
    with device, user_errors(f"model {_model_name(arguments)} cannot be made", (ValueError, ImportError)):
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


def length_limit(
    tokenizer: PreTrainedTokenizerBase,
    max_length: int | None,
    option: str = "max_length",
    *,
    config: PreTrainedConfig | None = None,
) -> int | None:
    """Return after how many tokens to cut a row: ``max_length``, or what the model can read, or ``None`` for no limit.

    A model whose ``config`` states no number of positions, such as T5, reads any number, and what the tokenizer says is
    only what it was trained with.

    Raises:
        UserError: ``max_length`` is more than the model can read.
    """
    readable = tokenizer.model_max_length
    is_firm = config is None or getattr(config, "max_position_embeddings", None) is not None
    if max_length is not None and max_length > readable and is_firm:
        raise UserError(
            f"{option} is {max_length}, but the model reads at most {readable} tokens; write a smaller number"
        )
    return max_length or (readable if readable < _NO_LIMIT else None)


def has_head(config: PreTrainedConfig, ends: tuple[str, ...]) -> bool:
    """Whether the checkpoint was saved with a head: by a class whose name ends in one of ``ends``."""
    return any(name.endswith(ends) for name in getattr(config, "architectures", None) or ())


def tell_new_head(arguments: ModelArguments, config: PreTrainedConfig, ends: tuple[str, ...], use: str) -> None:
    """Say so if the head is new and the rest of the model is not: the untrained model then answers blindly."""
    if arguments.config_name is None and not has_head(config, ends):
        say(f"the model has no head that {use}; a new one is trained")


def described(model: PreTrainedModel) -> str:
    """Return the model's class, size and dtype, in words."""
    parameters = list(model.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    total = sum(parameter.numel() for parameter in parameters)
    dtypes = " and ".join(sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}))
    part = "" if trained == total else f", of which {trained:,} are trained"
    return f"{type(model).__name__}, {total:,} parameters in {dtypes}{part}"


def require_offsets(tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that the tokenizer tells where in the text its tokens are.

    Raises:
        UserError: it is one in Python, which cannot.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"the tokenizer ({type(tokenizer).__name__}) does not tell where its tokens are in the text; use a model"
            " that has a fast one (tokenizer.json), or name its tokenizer in tokenizer_name"
        )


def _model_name(arguments: ModelArguments) -> str:
    """Where the configuration is, and what belongs to it; the weights, too, but for a new model."""
    name = arguments.model_name_or_path or arguments.config_name
    if name is None:
        raise UserError("model_name_or_path is missing: a model on the Hub, a folder, or package://NAME/FOLDER")
    return name


def _options_of_name(arguments: ModelArguments) -> str:
    """The options that say where the model is."""
    name = "config_name" if arguments.model_name_or_path is None else "model_name_or_path"
    return name if arguments.gguf_file is None else f"{name}, gguf_file"


def _hub_options(arguments: ModelArguments) -> dict[str, Any]:
    options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code, "revision": arguments.model_revision}
    if arguments.gguf_file is not None:
        options["gguf_file"] = arguments.gguf_file
    return options
