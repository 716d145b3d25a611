"""Reads value objects out of JSON that others may have changed, and says which field is wrong. Pure."""

import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from math import isfinite
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

Value = TypeVar("Value")


def value_object(kind: Callable[..., Value], kept: Any, name: str) -> Value:
    """The dataclass `kind` of the fields in `kept`, each of the type that it says.

    Understood are numbers, which have to be finite, texts, `None`, dictionaries, tuples and other dataclasses.

    Raises:
        ValueError: it is none, and why, with the `name` of the field.

    Example:
        >>> from hf_mbp.plan import Budget
        >>> value_object(Budget, {"max_tokens": "many"}, "budget")
        Traceback (most recent call last):
        ValueError: budget.max_tokens is 'many'
    """
    if not isinstance(kept, dict):
        raise ValueError(f"{name} is {_shown(kept)}")
    known = {field.name: field for field in fields(kind) if field.init}  # type: ignore[arg-type]
    unknown = next((key for key in kept if key not in known), None)
    if unknown is not None:
        raise ValueError(f"{name} has {unknown!r}, which is not known")
    for key, field in known.items():
        if key not in kept and field.default is MISSING and field.default_factory is MISSING:
            raise ValueError(f"{name} has no {key!r}")
    hints = get_type_hints(kind)
    return kind(**{key: _read(hints[key], value, f"{name}.{key}") for key, value in kept.items()})


def _read(hint: Any, value: Any, name: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return None if value is None else _read(next(h for h in get_args(hint) if h is not type(None)), value, name)
    if is_dataclass(hint):
        return value_object(hint, value, name)  # type: ignore[arg-type]
    if origin is tuple and isinstance(value, list):
        return tuple(_read(get_args(hint)[0], one, f"{name}[{index}]") for index, one in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _read(get_args(hint)[1], one, f"{name}.{key}") for key, one in value.items()}
    if hint is not Any and not _is_one(hint, value):
        raise ValueError(f"{name} is {_shown(value)}")
    return float(value) if hint is float else value  # an integer may be larger than NumPy's


def _is_one(hint: Any, value: Any) -> bool:
    if isinstance(value, bool) or hint not in (int, float):
        return isinstance(hint, type) and isinstance(value, hint) and isinstance(value, bool) == (hint is bool)
    if not isinstance(value, (int, hint)):
        return False
    try:
        return isfinite(value)
    except OverflowError:  # an integer that is larger than any float
        return False


def _shown(value: Any) -> str:
    return f"{value!r:.40}"
