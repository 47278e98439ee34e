"""Checkpoints of architectures that transformers has no class for: our own names, in Hugging Face's layout of files.

`config.json` says `model_type: distllm_<arch>`; only distllm reads it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from enum import Enum
from typing import Any

import torch

from distllm import registry
from distllm.arch.heads import HEADS
from distllm.arch.hf.family import Family
from distllm.arch.hf.rules import Rule, same
from distllm.errors import CheckpointError


class OwnFamily(Family):
    """All options under their own names, all tensors under their own names."""

    base_prefix = ""
    settings: Mapping[str, str] = {}

    def __init__(self, arch: str, options_class: type) -> None:
        self.arch, self.options_class = arch, options_class
        self.model_type = f"distllm_{arch}"
        self.architectures = {head: f"Distllm_{arch}_{head}" for head in HEADS}

    def read_options(self, config: Mapping[str, Any]) -> Any:
        """Translate config.json to options.

        Raises:
            CheckpointError: a setting is missing or unknown to this version.
        """
        known = {f.name: f for f in fields(self.options_class)}
        given = config.get("distllm_options")
        if not isinstance(given, Mapping) or set(given) - set(known):
            extra = sorted(set(given or ()) - set(known))
            raise CheckpointError(
                f"config.json of a {self.model_type} model must hold distllm_options"
                + (
                    f"; it has {', '.join(extra)}, which this version does not know."
                    if extra
                    else "."
                )
            )
        defaults = self.options_class()
        return self.options_class(
            **{
                name: type(getattr(defaults, name))(value)
                if isinstance(getattr(defaults, name), Enum)
                else value
                for name, value in given.items()
            }
        )

    def write_options(self, options: Any, head: str) -> dict[str, Any]:
        """Translate options to config.json."""
        plain = {k: str(v) if isinstance(v, Enum) else v for k, v in asdict(options).items()}
        return {
            "architectures": [self.architectures[head]],
            "model_type": self.model_type,
            "vocab_size": options.vocab_size,
            "distllm_options": plain,
            "distllm_head": head,
        }

    def holds(self, options: Any) -> bool:
        """True for every model of the architecture."""
        return options.name == self.arch

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return a rule per tensor of the model, names unchanged."""
        with torch.device("meta"):
            model = registry.get("arch", self.arch)(options, head=head)
        names = [n for n in model.state_dict() if not n.startswith("head.reward_")]
        return [same(name, name) for name in names]
