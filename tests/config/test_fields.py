"""Options classes: every field annotated, documented and of a kind that composes; docstrings found without running."""

import ast
import dataclasses
import inspect
import textwrap
from dataclasses import dataclass, field
from enum import StrEnum

import pytest

from distllm.config.fields import meaning, type_words
from distllm.config.files import GROUPS
from distllm.config.schema import Config, options_of
from distllm.generation.options import GenerationOptions
from distllm.pipeline.options import PipelineStage
from distllm.train.options import RunOptions, TrainOptions

CLASSES = {type(o) for g in GROUPS for o in options_of(g).values()}
CLASSES |= {Config, GenerationOptions, RunOptions, TrainOptions, PipelineStage}


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda c: c.__name__))
def test_every_field_is_annotated_and_documented(cls):
    for base in cls.__mro__:
        if not dataclasses.is_dataclass(base):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        assert isinstance(definition, ast.ClassDef)
        bare = [n.lineno for n in definition.body if isinstance(n, ast.Assign)]
        assert bare == [], f"{base.__name__}: a field without annotation vanishes silently"
    chosen = () if cls is PipelineStage else ("name",)
    silent = [
        f.name for f in dataclasses.fields(cls) if f.name not in chosen and not meaning(cls, f.name)
    ]
    assert silent == [], f"{cls.__name__} has fields without a docstring"


@pytest.mark.parametrize("cls", sorted(CLASSES, key=lambda c: c.__name__))
def test_options_are_keyword_only_with_slots_and_defaults(cls):
    assert "__slots__" in vars(cls)
    assert all(f.kw_only for f in dataclasses.fields(cls))
    required = [f.name for f in dataclasses.fields(cls)
                if f.default is f.default_factory is dataclasses.MISSING]  # fmt: skip
    assert required == (["name"] if cls is PipelineStage else [])


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Parent:
    size: int = 1
    """From the
    parent."""
    colour: Colour = Colour.RED


@dataclass
class Child(Parent):
    size: int = 2
    names: list[str] = field(default_factory=list)
    """In the child."""


def test_meanings_are_inherited_and_on_one_line():
    assert meaning(Child, "size") == "From the parent."
    assert meaning(Child, "names") == "In the child."
    assert meaning(Child, "colour") == ""


@pytest.mark.parametrize(
    "hint, words",
    [
        (int, "an integer"),
        (float | None, "a number, or null"),
        (bool, "true or false"),
        (str, "a text"),
        (Colour, "one of red, blue"),
        (list[str], "a list ([a,b]) of which each item is a text"),
        (dict[str, float], "names with a value each ({a:1}) that is a number"),
    ],
)
def test_types_in_words(hint, words):
    assert type_words(hint) == words
