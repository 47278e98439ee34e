"""Rebuild a module with a bug written into its source, so that a test can show it would notice."""

import inspect
from types import ModuleType

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
