"""distllm: train language models, from raw text to reinforcement learning, on one machine or many.

The public surface is loaded on first use, so that `import distllm` and `distllm --help` stay free of torch:
`load_model`, `save_model`, `generate`, `compose`, and `train`, which is a package that can be called.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distllm import train as train
    from distllm.arch.io import load_model as load_model
    from distllm.arch.io import save_model as save_model
    from distllm.config.compose import compose as compose
    from distllm.generation.tensors import generate as generate

_HOMES = {
    "load_model": "distllm.arch.io",
    "save_model": "distllm.arch.io",
    "generate": "distllm.generation.tensors",
    "compose": "distllm.config.compose",
}

__all__ = ["compose", "generate", "load_model", "save_model", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        return importlib.import_module("distllm.train")
    if name not in _HOMES:
        raise AttributeError(f"module 'distllm' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
