"""Name -> class, one namespace per folder. A registry key is the name of the file that defines the class.

Dropping a file into a folder is all it takes to add an option: the folder's files are imported at the first look-up.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import TypeVar

from distllm.errors import ConfigError

FOLDERS = {
    "arch": "distllm.arch",
    "objective": "distllm.objectives",
    "data": "distllm.data",
    "engine": "distllm.engines",
    "optim": "distllm.optim",
    "schedule": "distllm.optim",
    "algorithm": "distllm.rl.algorithms",
    "reward": "distllm.rl.rewards",
    "environment": "distllm.rl.environments",
    "tracking": "distllm.tracking",
}

C = TypeVar("C", bound=type)

_entries: dict[str, dict[str, type]] = {group: {} for group in FOLDERS}
_discovered: set[str] = set()


def register(group: str) -> Callable[[C], C]:
    """Return a class decorator that files the class under `group` by the name of its module."""

    def file_under(cls: C) -> C:
        name = cls.__module__.rsplit(".", 1)[-1]
        known = _entries[group].get(name)
        if known is not None and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"{group}={name} is registered by both {known} and {cls}")
        _entries[group][name] = cls
        return cls

    return file_under


def names(group: str) -> list[str]:
    """List the registered names of `group`, sorted."""
    _discover(group)
    return sorted(_entries[group])


def get(group: str, name: str) -> type:
    """Look up `name` in `group`.

    Raises:
        ConfigError: the name is unknown; the message holds the nearest names.
    """
    _discover(group)
    try:
        return _entries[group][name]
    except KeyError:
        raise ConfigError(unknown_name(group, name, _entries[group])) from None


def unknown_name(what: str, name: str, known: Iterable[str]) -> str:
    """Word the message for a name that is not among `known`: nearest first, then all."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{what}={name} is unknown.{hint} Known: {', '.join(known)}."


def _discover(group: str) -> None:
    if group in _discovered:
        return
    _discovered.add(group)
    package = importlib.import_module(FOLDERS[group])
    for module in pkgutil.iter_modules(package.__path__):
        if not module.ispkg:
            importlib.import_module(f"{package.__name__}.{module.name}")
