"""Reads `key=value` as typed, and words what is wrong with it: syntax, unknown keys, unknown options, wrong types.

Hydra's grammar parses values, except where the field holds text: that is taken as typed, so that a path or a name
needs no quoting beyond the shell's.
"""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from distllm.config.fields import enum_of, is_text, type_words
from distllm.errors import ConfigError

# Words of other frameworks -> ours, for suggestions only.
_FOREIGN = {
    "learning_rate": "optim.lr",
    "batch_size": "train.global_batch_size",
    "train_batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.micro_batch_size",
    "grad_accum_steps": "train.micro_batch_size",
    "epochs": "train.max_steps",
    "num_train_epochs": "train.max_steps",
    "steps": "train.max_steps",
    "max_length": "train.seq_len",
    "block_size": "train.seq_len",
    "bf16": "train.precision",
    "fp16": "train.precision",
    "dtype": "train.precision",
    "output_dir": "run.dir",
    "out_dir": "run.dir",
    "dataset": "data.path",
    "n_layer": "arch.n_layers",
    "num_hidden_layers": "arch.n_layers",
    "hidden_size": "arch.d_model",
    "n_embd": "arch.d_model",
}

_SECRETS = ("api_key", "_token", "secret", "password")


@dataclass(frozen=True, slots=True)
class Override:
    """One `key=value` of the command line."""

    key: str
    text: str
    """The value as typed."""


def parse(arguments: Iterable[str]) -> list[Override]:
    """Split each argument at its first `=`.

    Raises:
        ConfigError: an argument is not `key=value`, or asks Hydra to add or delete a key.
    """
    problems, found = [], []
    for argument in arguments:
        key, equals, text = argument.partition("=")
        key = key.strip()
        if key.startswith(("+", "~")):
            name = key.lstrip("+~")
            problems.append(
                f"`{key}`: settings are changed, never added or removed. Type {name}=VALUE."
            )
        elif not equals:
            problems.append(f"`{argument}` is not a setting. Type key=value.")
        elif not all(part.isidentifier() for part in key.split(".")):
            problems.append(
                f"`{key}` is not a key. Type words joined by dots, such as optim.lr=0.001."
            )
        else:
            found.append(Override(key, text))
    raise_all(problems)
    return found


def raise_all(problems: Sequence[str]) -> None:
    """Report all `problems` in one error.

    Raises:
        ConfigError: there are any.
    """
    if len(problems) == 1:
        raise ConfigError(problems[0])
    if problems:
        raise ConfigError(f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems))


def value_of(override: Override, hint: Any, example: Any) -> Any:
    """Read the value for a field of type `hint`.

    Raises:
        ConfigError: it cannot be read, or names several values; `example` is shown.
    """
    text = override.text
    if (choices := enum_of(hint)) and text in [m.value for m in choices]:
        return choices(text)  # OmegaConf would look for the member's name
    quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "'\""
    if is_text(hint) and not quoted:
        return None if text == "null" else text
    try:
        parsed = _parser().parse_override(f"{override.key}={text}")
    except HydraException:
        raise ConfigError(wrong_type(override, hint, example)) from None
    if parsed.is_sweep_override():
        raise ConfigError(
            f"{override.key}={text} names several values, and a run takes one. "
            f"Needed: {type_words(hint)}."
        )
    return parsed.value()


def wrong_type(override: Override, hint: Any, example: Any) -> str:
    """Word the message for a value that does not fit the field."""
    message = f"{override.key}={override.text} does not fit: needed is {type_words(hint)}."
    whole = _as_whole_number(override.text)
    if hint is int and whole is not None:
        return f"{message} Type {override.key}={whole}."
    if example in (None, "", []):
        return message
    return f"{message} Example: {override.key}={str(example).lower() if isinstance(example, bool) else example}."


def unknown_key(key: str, known: Iterable[str], elsewhere: Sequence[str] = ()) -> str:
    """Word the message for a key that no setting has.

    Args:
        key: as typed.
        known: every dotted key that exists in this config, and the names of the groups.
        elsewhere: `group=option` whose settings do include `key`.
    """
    known = list(known)
    if key.lower().endswith(_SECRETS):
        return (
            f"{key} is not a setting: secrets come from the environment only and are never written to disk. "
            "Set WANDB_API_KEY or HF_TOKEN."
        )
    if elsewhere:
        listed = ", ".join([*elsewhere[:-2], " and ".join(elsewhere[-2:])])
        return f"{key} is a setting of {listed}, which this run does not use."
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return f"{key} is a group of settings. Set one of them: {', '.join(inside)}."
    near = nearest_key(key, known)
    if near is None:
        groups = sorted({k.partition(".")[0] for k in known})
        return f"{key} is not a setting, and none is near. Known: {', '.join(groups)}; `distllm explain` lists all."
    return f"{key} is not a setting. Did you mean {near}?"


def nearest_key(key: str, known: Iterable[str]) -> str | None:
    """Return the known dotted key that `key` most likely stands for: a typo, a missing group, another word for it."""
    known = list(known)
    group, _, last = key.rpartition(".")
    translated = _FOREIGN.get(last)
    if translated in known:
        return translated

    def likeness(candidate: str) -> float:
        in_group, _, name = candidate.rpartition(".")
        by_name = 0.85 * _ratio(last, name) + 0.1 * _ratio(group, in_group)
        return max(_ratio(key, candidate), by_name)

    best = max(known, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.6 else None


def _ratio(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _as_whole_number(text: str) -> int | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return int(number) if number.is_integer() else None


def _parser() -> OverridesParser:
    return OverridesParser.create()
