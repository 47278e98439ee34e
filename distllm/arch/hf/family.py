"""What a checkpoint family is: names of settings and tensors, and which switches make it. Files are `arch/io.py`'s.

Each file beside this one that defines `FAMILY` is one family; what several share is in `causal.py`.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from distllm.arch import hf
from distllm.arch.hf.rules import Rule, load_all, store_all
from distllm.arch.options import (
    Activation,
    LayerType,
    TransformerOptions,
    layer_type,
    resolve_d_head,
)
from distllm.errors import CheckpointError
from distllm.registry import unknown_name

ACTIVATIONS = {
    "silu": Activation.silu,
    "swish": Activation.silu,
    "gelu": Activation.gelu,
    "gelu_new": Activation.gelu_tanh,
    "gelu_pytorch_tanh": Activation.gelu_tanh,
    "relu": Activation.relu,
    "relu2": Activation.relu2,
}
"""Their name -> ours. `gelu_new` and `gelu_pytorch_tanh` are one function, written twice."""

_NORM_BUFFERS = {"distllm_reward_mean": "head.reward_mean", "distllm_reward_std": "head.reward_std"}


class Family(ABC):
    """Translates one `model_type`. Subclasses say in class attributes what is theirs."""

    model_type: str
    arch: str
    """Registry key of our architecture."""
    options_class: type[TransformerOptions]
    architectures: Mapping[str, str]
    """Head -> class in transformers, or a name of our own where there is none."""
    settings: Mapping[str, str]
    """Their setting -> our option of the same value."""
    defaults: Mapping[str, Any] = {}
    """Their setting -> value where config.json leaves it out (what their config class would take)."""
    constants: Mapping[str, Any] = {}
    """Their setting -> the only value we can run; written on export."""
    fixed: Mapping[str, Any] = {}
    """Our option -> the value that every model of the family has."""
    base_prefix = "model."
    """What stands before the names of tensors that a model without a head has too."""
    activation_key = "hidden_act"
    activation_names: Mapping[str, str] = {}
    """Our activation -> their name for it, where the first one in `ACTIVATIONS` is not the usual one here."""

    tiny: Mapping[str, Any] = {}
    """Their settings of a small model, in which every switch of the family is felt: what the equality contract builds."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the options that are not one setting each."""
        return {}

    def write(self, options: Any) -> dict[str, Any]:
        """Return the settings that are not one option each."""
        return {}

    @abstractmethod
    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""

    def ignored(self, name: str, options: Any) -> bool:
        """True for a tensor of theirs that holds nothing of its own: a tied copy, a computed table."""
        return False

    def from_hf(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: str | None = None
    ) -> tuple[Any, dict[str, Tensor], str]:
        """Translate (config.json, tensors) to (options, our state dict, the head that was saved).

        With `head` the state is that of a model with this head, as far as its tensors are there. Tensors that are no part of the model stay in the state dict under their own names, so that the caller finds them.

        Raises:
            CheckpointError: the config asks for something we do not have.
        """
        options, saved_head = self.read_options(config), self.head_of(config)
        rules = self.rules(options, head or saved_head)
        known = {n for r in [*rules, *self.rules(options, saved_head)] for n in r.theirs}
        tensors = self.renamed(tensors, known)
        state = load_all(rules, tensors)
        extra = [n for n in tensors if n not in known and not self.ignored(n, options)]
        state |= {name: tensors[name] for name in sorted(extra)}
        for key, name in _NORM_BUFFERS.items():
            if key in config:
                state[name] = torch.tensor(float(config[key]))
        return options, state, saved_head

    def renamed(self, tensors: Mapping[str, Tensor], known: set[str]) -> Mapping[str, Tensor]:
        """Add the prefix that files of models without a head, and the first files of GPT-2, leave out."""
        if any(name.startswith(self.base_prefix) for name in tensors):
            return tensors
        prefix = self.base_prefix
        return {f"{prefix}{n}" if f"{prefix}{n}" in known else n: t for n, t in tensors.items()}

    def to_hf(
        self, options: Any, state: Mapping[str, Tensor], head: str
    ) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Translate a model to (config.json, tensors).

        Args:
            options: the model's shape.
            state: our parameter names -> full tensors.
            head: name of the model's head.
        """
        config = self.write_options(options, head)
        config["dtype"] = str(state["embed.weight"].dtype).removeprefix("torch.")
        for key, name in _NORM_BUFFERS.items():
            if name in state:
                config[key] = float(state[name])
        tensors = store_all(self.rules(options, head), state)
        if head == "none":
            tensors = {n.removeprefix(self.base_prefix): t for n, t in tensors.items()}
        return config, tensors

    def read_options(self, config: Mapping[str, Any]) -> Any:
        """Translate config.json to options.

        Raises:
            CheckpointError: settings are missing or ask for what we do not have.
        """
        config = {**self.defaults, **config}
        wrong = [
            f"{key}={config[key]} (readable: {value})"
            for key, value in self.constants.items()
            if key in config and config[key] != value and (config[key] or value)
        ]
        if wrong:
            raise CheckpointError(
                f"config.json asks for what {self.model_type} does not have here: {', '.join(wrong)}."
            )
        given = {ours: config[theirs] for theirs, ours in self.settings.items() if theirs in config}
        needed = ("vocab_size", "d_model", "n_layers", "n_heads", "d_ff", "max_seq_len")
        missing = [t for t, o in self.settings.items() if o in needed and o not in given]
        if missing:
            raise CheckpointError(
                f"config.json of a {self.model_type} model lacks {', '.join(missing)}."
            )
        if self.activation_key in config and "activation" not in self.fixed:
            given["activation"] = self._activation(config[self.activation_key])
        given["num_labels"] = num_labels(config)
        given |= {**self.fixed, **self.read({**config})}
        return self.options_class(family=self.model_type, **given)

    def write_options(self, options: Any, head: str) -> dict[str, Any]:
        """Translate options to config.json."""
        config: dict[str, Any] = {
            "architectures": [self.architectures[head]],
            "model_type": self.model_type,
        }
        config |= {theirs: getattr(options, ours) for theirs, ours in self.settings.items()}
        config |= self.constants
        if self.activation_key not in config:
            ours = str(options.activation)
            first = next(theirs for theirs, a in ACTIVATIONS.items() if a == ours)
            config[self.activation_key] = self.activation_names.get(ours, first)
        config |= self.write(options)
        config["distllm_head"] = head
        if head == "last":
            config |= {"num_labels": 1, "problem_type": "regression"}
        if head in ("classify", "tag"):
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(options.num_labels)}
            config["label2id"] = {f"LABEL_{i}": i for i in range(options.num_labels)}
        return config

    def holds(self, options: Any) -> bool:
        """True where a checkpoint of this family says all that `options` say."""
        if options.name != self.arch:
            return False
        try:
            again = self.read_options(self.write_options(options, next(iter(self.architectures))))
        except (CheckpointError, StopIteration, KeyError):
            return False
        return _comparable(again) == _comparable(options)

    def head_of(self, config: Mapping[str, Any]) -> str:
        """Return the name of the head that a checkpoint has."""
        head = config.get("distllm_head")
        if head is not None:
            if head not in self.architectures:
                raise CheckpointError(
                    f"config.json has distllm_head={head}; readable are {', '.join(sorted(self.architectures))}."
                )
            return head
        first = next(iter(self.architectures.values()))
        architecture = (config.get("architectures") or [first])[0]
        found = [h for h, known in self.architectures.items() if architecture == known]
        if {"last", "classify"} <= set(found):
            return "last" if num_labels(config) == 1 else "classify"
        if not found:
            raise CheckpointError(
                f"config.json names the architecture {architecture}; readable are "
                f"{', '.join(sorted(set(self.architectures.values())))}."
            )
        return found[0]

    def _activation(self, name: str) -> Activation:
        if name not in ACTIVATIONS:
            raise CheckpointError(
                f"config.json has {self.activation_key}={name}; readable are {', '.join(ACTIVATIONS)}."
            )
        return ACTIVATIONS[name]


def num_labels(config: Mapping[str, Any]) -> int:
    """Return how many outputs a classification head has (transformers writes the labels, not their number)."""
    if "num_labels" in config:
        return config["num_labels"]
    return len(config.get("id2label") or (0, 1))


@functools.cache
def families() -> dict[str, Family]:
    """Return model_type -> family, for every file of the folder."""
    modules = [
        importlib.import_module(f"{hf.__name__}.{m.name}")
        for m in pkgutil.iter_modules(hf.__path__)
    ]
    found = [m.FAMILY for m in modules if hasattr(m, "FAMILY")]
    return {family.model_type: family for family in found}


def family_of(options: Any) -> Family:
    """Return the family to write `options` as: the one they name, else the first that holds them.

    Raises:
        CheckpointError: the family they name cannot hold them.
    """
    known = families()
    if options.family:
        if options.family not in known:
            raise CheckpointError(unknown_name("arch.family", options.family, known))
        if known[options.family].holds(options):
            return known[options.family]
        raise CheckpointError(
            f"arch.family={options.family} cannot hold a model with these switches. Set arch.family= (empty) to "
            "write whatever family can."
        )
    preferred = sorted(known.values(), key=lambda f: (f.model_type != "llama", f.model_type))
    for family in preferred:
        if family.holds(options):
            return family
    raise CheckpointError(
        f"no checkpoint family can hold an arch={options.name} model with these switches."
    )


def expand_layer_types(options: TransformerOptions) -> list[str]:
    """Write the types of all layers in their words."""
    words = {LayerType.full: "full_attention", LayerType.window: "sliding_attention"}
    return [words[layer_type(options, i)] for i in range(options.n_layers)]


def shorten_layer_types(theirs: Sequence[str]) -> list[str]:
    """Return the shortest list of our words that repeats into `theirs`."""
    words = {"full_attention": "full", "sliding_attention": "window"}
    unknown = sorted(set(theirs) - set(words))
    if unknown:
        raise CheckpointError(
            f"config.json has layer_types {', '.join(unknown)}; readable are {', '.join(words)}."
        )
    ours = [words[t] for t in theirs]
    for length in range(1, len(ours)):
        if all(ours[i] == ours[i % length] for i in range(len(ours))):
            return ours[:length]
    return ours


def _comparable(options: Any) -> dict[str, Any]:
    """Return what a model computes, without what has several spellings or is not kept."""
    types, d_head = expand_layer_types(options), resolve_d_head(options)
    plain = replace(
        options,
        family="",
        d_head=d_head,
        attention_scale=d_head**-0.5
        if options.attention_scale is None
        else options.attention_scale,
        layer_types=types,
        window=options.window if "sliding_attention" in types else None,
    )
    return {f.name: getattr(plain, f.name) for f in fields(plain) if f.name not in _NOT_COMPARED}


_NOT_COMPARED = {"num_labels"}
