"""What a field of an options dataclass takes and means: its type in plain words, its docstring, its choices.

The meaning is the string under the field, read from the source with `ast`; Python itself drops such strings.
"""

import ast
import dataclasses
import functools
import inspect
import sys
import textwrap
import types
import typing
from enum import Enum
from typing import Any


def field_type(owner: type, name: str) -> Any:
    """Return the type of field `name` of the options class `owner`."""
    return _hints(owner)[name]


def accepts_none(hint: Any) -> bool:
    """True where None is a value."""
    return type(None) in typing.get_args(hint)


def bare(hint: Any) -> Any:
    """Return the type without its `| None`."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def is_text(hint: Any) -> bool:
    """True where the value is a word or a text."""
    kind = bare(hint)
    return isinstance(kind, type) and issubclass(kind, str)


def enum_of(hint: Any) -> type[Enum] | None:
    """Return the enumeration that the value is a member of, if it is one."""
    kind = bare(hint)
    return kind if isinstance(kind, type) and issubclass(kind, Enum) else None


def is_mapping(hint: Any) -> bool:
    """True where the value maps names to values."""
    return typing.get_origin(bare(hint)) is dict


def type_words(hint: Any) -> str:
    """Say in plain words what a field takes: `an integer`, `a number or null`, `one of error, skip`."""
    kind = bare(hint)
    simple = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
    if kind in simple:
        words = simple[kind]
    elif choices := enum_of(hint):
        words = f"one of {', '.join(str(m.value) for m in choices)}"
    elif typing.get_origin(kind) is list:
        words = f"a list ([a,b]) of which each item is {type_words(typing.get_args(kind)[0])}"
    elif typing.get_origin(kind) is dict:
        words = f"names with a value each ({{a:1}}) that is {type_words(typing.get_args(kind)[1])}"
    elif dataclasses.is_dataclass(kind):
        words = f"{{{', '.join(f.name for f in dataclasses.fields(kind))}}}"
    else:
        words = str(kind)
    return f"{words}, or null" if accepts_none(hint) else words


def meaning(owner: type, name: str) -> str:
    """Return the docstring of field `name`, on one line; empty where there is none."""
    for cls in owner.__mro__:
        if name in (found := _field_docstrings(cls)):
            return found[name]
    return ""


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


@functools.cache
def _field_docstrings(cls: type) -> dict[str, str]:
    if not dataclasses.is_dataclass(cls) or cls.__module__ not in sys.modules:
        return {}
    body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for node, following in zip(body.body, body.body[1:], strict=False):
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
            found[node.target.id] = " ".join(str(following.value.value).split())
    return found
