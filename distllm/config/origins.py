"""Tells where a setting's value comes from: a dataclass, a YAML file of `conf/`, or the command line.

Hydra keeps no record of this, so the files that it lays over each other are read once more, in its order.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf

from distllm.config.checks import rules
from distllm.config.compose import compose, known_keys, read_files
from distllm.config.fields import field_type, meaning, type_words
from distllm.config.files import CHOOSABLE, GROUPS, conf_dir
from distllm.config.overrides import parse, unknown_key
from distllm.config.schema import leaves
from distllm.errors import ConfigError

_CHOSEN = "Which option of the group is used; chosen by the group's name."


@dataclass(frozen=True, slots=True)
class Explanation:
    """Everything there is to say about one setting."""

    key: str
    value: Any
    origin: str
    """The dataclass, the file below `conf/`, or the override that gave the value."""
    default: Any
    """Of the dataclass."""
    type: str
    meaning: str
    resume: str
    """`same`: must not change when the run is resumed; `free`: may."""


def explain(key: str = "", arguments: Iterable[str] = ()) -> list[Explanation]:
    """Explain the setting `key`, all settings of the group `key`, or all there are, under the overrides `arguments`.

    Raises:
        ConfigError: there is no such setting; the message holds the nearest one.
    """
    arguments = list(arguments)
    config = compose(arguments, check=False)
    wanted = [f for f in leaves(config) if not key or f"{f.key}.".startswith(f"{key}.")]
    if not wanted:
        raise ConfigError(unknown_key(key, known_keys(config)))
    written = _written_values(arguments)
    typed = {o.key: f"{o.key}={o.text} as typed" for o in parse(arguments)}
    found = []
    for leaf in wanted:
        name = leaf.key.rpartition(".")[2]
        chosen = name == "name" and leaf.key.partition(".")[0] in GROUPS
        found.append(
            Explanation(
                key=leaf.key,
                value=leaf.value,
                origin=typed.get(leaf.key) or written.get(leaf.key) or _class_of(leaf.owner),
                default=leaf.default,
                type=type_words(field_type(leaf.owner, name)) + _rule(leaf.key),
                meaning=meaning(leaf.owner, name) or (_CHOSEN if chosen else ""),
                resume="free" if leaf.free else "same",
            )
        )
    return found


def _written_values(arguments: Iterable[str]) -> dict[str, str]:
    """Return dotted key -> the last YAML file that sets it."""
    choices = {o.key: o.text for o in parse(arguments) if o.key in CHOOSABLE}
    written: dict[str, str] = {}
    for name, package in read_files(choices):
        path = conf_dir() / f"{name}.yaml"
        if name.startswith("schema/") or not path.is_file():
            continue
        content = OmegaConf.to_container(OmegaConf.load(path))
        assert isinstance(content, dict)
        content.pop("defaults", None)
        prefix = f"{package}." if package else ""
        keys = _keys(content, prefix) + ([f"{prefix}name"] if package in GROUPS else [])
        written |= dict.fromkeys(keys, f"conf/{name}.yaml")
    return written


def _keys(content: Mapping[Any, Any], prefix: str) -> list[str]:
    found = []
    for name, value in content.items():
        found.append(f"{prefix}{name}")
        if isinstance(value, Mapping):
            found += _keys(value, f"{prefix}{name}.")
    return found


def _class_of(owner: type) -> str:
    return f"default of {owner.__name__} ({owner.__module__.replace('.', '/')}.py)"


def _rule(key: str) -> str:
    rule = rules().get(key)
    return f"; {rule.words}" if rule else ""
