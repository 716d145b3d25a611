"""Docstrings as the reference of the site shows them; an extension of Griffe, which mkdocstrings reads code with.

* A section `Example:` is one of examples, which Griffe calls `Examples:`.
* The options of `MBPConfig` are described by the `help` of their fields, which the command line shows, too.
"""

import ast
from typing import Any

import griffe

OPTIONS = "MBPConfig"


class SiteDocstrings(griffe.Extension):
    """Called by Griffe for each object that it reads."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example:\n", "Examples:\n")

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        if attr.parent is not None and attr.parent.name == OPTIONS and (field := _field_of(attr)):
            attr.docstring = griffe.Docstring(_help_of(field["metadata"]), parent=attr)
            attr.value = ast.unparse(field["default"])


def _field_of(attr: griffe.Attribute) -> dict[str, ast.expr] | None:
    """The arguments of `field(...)`, if that is what the attribute is set to."""
    call = ast.parse(str(attr.value), mode="eval").body
    if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "field":
        return {str(keyword.arg): keyword.value for keyword in call.keywords}
    return None


def _help_of(metadata: ast.expr) -> str:
    assert isinstance(metadata, ast.Dict)  # noqa: S101
    (text,) = [value for key, value in zip(metadata.keys, metadata.values, strict=True) if _is_help(key)]
    return str(ast.literal_eval(text))


def _is_help(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "help"
