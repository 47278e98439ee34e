"""Rebuild a module with a bug written into its source, so that a test can show it would notice."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from distllm import registry


def with_bug(module: ModuleType, old: str, new: str) -> ModuleType:
    """Return a copy of `module` in which the one occurrence of `old` reads `new`.

    The original stays untouched. An `old` that no longer occurs once is an error: the test then
    shows nothing.
    """
    source = inspect.getsource(module)
    if source.count(old) != 1:
        raise LookupError(f"{module.__name__} holds {old!r} {source.count(old)} times, not once")
    copy = ModuleType(module.__name__)
    copy.__file__ = module.__file__
    entries = {group: dict(classes) for group, classes in registry._entries.items()}
    exec(compile(source.replace(old, new), str(module.__file__), "exec"), copy.__dict__)
    registry._entries.update(entries)  # a class of the copy must not replace the original
    return copy


@contextmanager
def planted(module: ModuleType, old: str, new: str) -> Iterator[None]:
    """Run the `with` block with the bug inside the real module: every function whose code it changes is replaced.

    Functions are replaced wherever a module or one of this module's dicts holds them, methods in their classes.
    """
    copy = with_bug(module, old, new)
    undo: list[tuple[Any, str, Any]] = []
    tables: list[tuple[dict[Any, Any], Any, Any]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        undo.append((owner, name, inspect.getattr_static(owner, name)))
        setattr(owner, name, value)

    for name, fresh in list(vars(copy).items()):
        real = vars(module).get(name)
        if inspect.isfunction(real) and inspect.isfunction(fresh) and _differs(real, fresh):
            for holder in list(sys.modules.values()):
                if getattr(holder, "__dict__", {}).get(name) is real:
                    put(holder, name, fresh)
            for table in [t for t in vars(module).values() if isinstance(t, dict)]:
                for key in [k for k, v in table.items() if v is real]:
                    table[key] = fresh
                    tables.append((table, key, real))
        elif inspect.isclass(real) and real.__module__ == module.__name__:
            for member, value in list(vars(fresh).items()):
                if _differs(vars(real).get(member), value):
                    put(real, member, value)
    if not undo:
        raise LookupError(f"{old!r} changes no function of {module.__name__}")
    try:
        yield
    finally:
        for owner, name, value in reversed(undo):
            setattr(owner, name, value)
        for table, key, value in tables:
            table[key] = value


def _differs(real: Any, fresh: Any) -> bool:
    real, fresh = (_code(x) for x in (real, fresh))
    return real is not None and fresh is not None and real != fresh


def _code(thing: Any) -> Any:
    """Reduce a function to what it does, without line numbers."""
    if isinstance(thing, property):
        thing = thing.fget
    if isinstance(thing, classmethod | staticmethod):
        thing = thing.__func__
    thing = getattr(thing, "__wrapped__", thing)
    code = getattr(thing, "__code__", thing if inspect.iscode(thing) else None)
    if code is None:
        return None
    inner = tuple(_code(c) if inspect.iscode(c) else repr(c) for c in code.co_consts)
    return (
        code.co_code,
        code.co_names,
        code.co_varnames,
        inner,
        repr(getattr(thing, "__defaults__", None)),
    )
