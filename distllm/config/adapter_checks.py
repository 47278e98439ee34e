"""What must hold for a run that trains low-rank adapters: values by themselves, against each other, and the machine."""

from __future__ import annotations

import importlib.util
from dataclasses import fields
from typing import TYPE_CHECKING

from distllm import registry
from distllm.arch.adapter import AdapterOptions
from distllm.config.rules import AT_LEAST_1, BELOW_1, NOT_NEGATIVE, POSITIVE, Rule, by_key

if TYPE_CHECKING:
    from distllm.config.schema import Config

_RULES: dict[Rule, str] = {
    AT_LEAST_1: "adapter.rank",
    POSITIVE: "adapter.alpha",
    BELOW_1: "adapter.dropout",
    Rule(lambda v: v in (4, 32), "must be 4 or 32"): "adapter.base_bits",
    NOT_NEGATIVE: "adapter.lr",
}
ENGINES = ("single", "ddp", "fsdp")
"""Those that leave frozen weights alone."""


def adapter_rules() -> dict[str, Rule]:
    """Return dotted key -> what its value must fulfil."""
    return by_key(_RULES)


def adapter_problems(config: Config) -> list[str]:
    """Check the adapter against the stage and the engine."""
    adapter, engine, stage = config.adapter, config.engine, config.stage.name
    if adapter.name == "none":
        usual = AdapterOptions()
        changed = [f.name for f in fields(adapter) if getattr(adapter, f.name) != getattr(usual, f.name)]  # fmt: skip
        return [
            f"adapter.{name}={getattr(adapter, name)} has no effect with adapter=none. Set adapter=lora."
            for name in changed
        ]
    problems = []
    if engine.name not in ENGINES:
        problems.append(
            f"adapter={adapter.name} with engine={engine.name}: that engine lays out every weight as one that is trained, "
            f"frozen ones with gradients and moments. Set engine to one of {', '.join(ENGINES)}."
        )
    mesh = getattr(engine, "mesh", None)
    if mesh is not None and mesh.tp_size > 1:
        problems.append(
            f"engine.mesh.tp_size={mesh.tp_size} with adapter={adapter.name}: the matrices of an adapter are not split over "
            "the tp axis. Set engine.mesh.tp_size=1."
        )
    if adapter.base_bits == 4 and engine.name == "fsdp":
        problems.append(
            "adapter.base_bits=4 with engine=fsdp: weights in 4 bits are not cut into shards. Set engine to single or ddp, or "
            "adapter.base_bits=32."
        )
    compares = stage in registry.names("algorithm") or stage in ("dpo", "kto", "orpo", "simpo")
    if adapter.dropout and compares:
        problems.append(
            f"adapter.dropout={adapter.dropout} with stage={stage}: all dropout is off where probabilities are compared, "
            "since it would tell one pass from another. Set adapter.dropout=0."
        )
    return problems


def adapter_machine_problems(config: Config) -> list[str]:
    """Check that there is a model to put the adapter beside, and the package that does it."""
    name, problems = config.adapter.name, []
    if name == "none":
        return []
    if importlib.util.find_spec("peft") is None:
        problems.append(
            f'adapter={name} needs the package peft, which is not installed. Type pip install "distllm[peft]", or set '
            "adapter=none."
        )
    if config.adapter.base_bits == 4 and importlib.util.find_spec("bitsandbytes") is None:
        problems.append(
            "adapter.base_bits=4 needs the package bitsandbytes, which is not installed. Type "
            'pip install "distllm[qlora]", or set adapter.base_bits=32.'
        )
    if config.model is None:
        problems.append(
            f"adapter={name} trains small matrices beside frozen weights, and without model=DIR these would be random. "
            "Set model=DIR, the model to start from, or adapter=none."
        )
    return problems
