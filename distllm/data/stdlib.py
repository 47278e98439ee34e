"""English documentation that every CPython carries, read at run time and never stored.

Two parts: the topics of `help()` (`pydoc_data.topics`, one document each) and the docstrings of the
standard library's modules, read with `ast` without importing them (one document a module). Left
out: test suites and their data, site-packages, the IDLE editor and turtle demos (programs, not
documented libraries), `lib2to3` (an old copy of tools), `encodings` (a hundred generated tables
with one docstring, which would put copies of training text into the held-out part), bundled pip
wheels and the platform's build configuration.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import gc
import os
import re
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from distllm.data.source import Source, check_split, heldout_flags
from distllm.errors import DataError
from distllm.registry import register
from distllm.types import Document

SKIPPED_FOLDERS = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idle_test", "idlelib",
    "lib-dynload", "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip

_NOT_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")

_Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class StdlibText:
    """What was read, sorted by name."""

    documents: tuple[tuple[str, str], ...]
    """(name, text)."""
    definitions: tuple[tuple[str, str], ...]
    """(module, name) of documented public classes and functions at the top of a module."""


@register("data")
class StdlibSource(Source):
    """Documents for pretraining, split by the hash of their names."""

    serves = ("documents",)

    def documents(self, split: str) -> list[Document]:
        """Return the documents of `split`, sorted by name."""
        check_split(split)
        known = read_stdlib().documents
        flags = heldout_flags([name for name, _ in known], self.options.heldout_fraction)
        return [
            Document(text=text, name=name)
            for (name, text), held in zip(known, flags, strict=True)
            if held == (split == "heldout")
        ]


@functools.cache
def read_stdlib() -> StdlibText:
    """Read the interpreter's documentation (about a second; kept for the life of the process).

    Raises:
        DataError: this interpreter carries neither topics nor sources.
    """
    documents: dict[str, str] = {}
    definitions: list[tuple[str, str]] = []
    for name, text in sorted(_topics().items()):
        documents[f"topic {name}"] = _clean(text)
    root = Path(sysconfig.get_paths()["stdlib"])
    num_modules = 0
    with _paused_gc():
        for module, tree in _modules(root):
            text = _clean("\n\n".join(_docstrings(module, tree)))
            if text:
                num_modules += 1
                documents[module] = text
                definitions += [(module, node.name) for node in _public(tree)]
    if not num_modules:
        warnings.warn(
            f"This Python has no standard library sources in {root}: data=stdlib holds "
            f"{len(documents)} help topics only.",
            stacklevel=2,
        )
    unique = {text: name for name, text in reversed(documents.items()) if text}
    if not unique:
        raise DataError(
            f"This Python carries no documentation (no pydoc_data.topics, no sources in {root}). "
            f"Set data=file data.path=FILE."
        )
    return StdlibText(
        tuple(sorted((name, text) for text, name in unique.items())), tuple(sorted(definitions))
    )


@contextlib.contextmanager
def _paused_gc() -> Iterator[None]:
    """Hold back the cyclic collector, which walks the syntax trees over and over (1.5 to 5 s)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _topics() -> dict[str, str]:
    """Return the texts of `help()`, or nothing and a warning."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        warnings.warn(
            "This Python has no pydoc_data.topics: its help topics are left out.", stacklevel=3
        )
        return {}
    return topics


def _modules(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Yield the name and syntax tree of each module below `root`, sorted by path."""
    paths = []
    for folder, inner, files in os.walk(root):
        inner[:] = [f for f in inner if f not in SKIPPED_FOLDERS and not f.startswith("config-")]
        paths += [Path(folder, file) for file in files if file.endswith(".py")]
    for path in sorted(paths):
        parts = path.relative_to(root).with_suffix("").parts
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # old escape sequences in the sources are not our business
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, OSError):
            continue  # templates and data files that only look like modules
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), tree


def _docstrings(module: str, tree: ast.Module) -> Iterator[str]:
    """Yield the docstrings of the module, its classes and functions, each under its header."""
    found = list(_documented(tree, ""))
    top = ast.get_docstring(tree)
    if top or found:
        yield f"module {module}" + (f"\n\n{top}" if top else "")
    yield from found


def _documented(parent: ast.Module | _Definition, prefix: str) -> Iterator[str]:
    """Yield `header, docstring` of the definitions directly inside, depth first."""
    for node in parent.body:
        if not isinstance(node, _Definition):
            continue
        name = prefix + node.name
        doc = ast.get_docstring(node)
        if doc:
            if isinstance(node, ast.ClassDef):
                yield f"class {name}\n{doc}"
            else:
                yield f"{name}({', '.join(a.arg for a in node.args.args)})\n{doc}"
        if isinstance(node, ast.ClassDef):
            yield from _documented(node, f"{name}.")


def _public(tree: ast.Module) -> Iterator[_Definition]:
    """Yield the documented public definitions at the top of a module."""
    for node in tree.body:
        if (
            isinstance(node, _Definition)
            and not node.name.startswith("_")
            and ast.get_docstring(node)
        ):
            yield node


def _clean(text: str) -> str:
    """Drop what is not text: lone surrogates and control characters other than tab and line end."""
    return _NOT_TEXT.sub("", text).strip()
