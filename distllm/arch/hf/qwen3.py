"""Qwen3: Llama with every head's queries and keys normalised before they are rotated."""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes
from distllm.arch.hf.qwen2 import read_windows, write_windows
from distllm.arch.options import QKNorm


class Qwen3(CausalFamily):
    """Qwen3, dense."""

    model_type = "qwen3"
    architectures = classes("Qwen3")
    tiny = {
        **TINY,
        "head_dim": 24,
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
    }
    fixed = {"qk_norm": QKNorm.head}
    defaults = {**CausalFamily.defaults, "head_dim": 128}

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings, windows and biases."""
        bias = bool(config.get("attention_bias", False))
        biases = {"qkv_bias": bias, "out_bias": bias}
        return super().read(config) | read_windows(config) | biases

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings, windows and biases."""
        return (
            super().write(options) | write_windows(options) | {"attention_bias": options.qkv_bias}
        )


FAMILY = Qwen3()
