"""Mistral: Llama, every layer with the same window."""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes
from distllm.arch.options import LayerType


class Mistral(CausalFamily):
    """Mistral 7B and its successors with one kind of layer."""

    model_type = "mistral"
    architectures = classes("Mistral")
    tiny = {**TINY, "sliding_window": 7}

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and the window."""
        window = config.get("sliding_window", 4096)  # null turns it off; leaving it out does not
        types = [str(LayerType.full if window is None else LayerType.window)]
        return super().read(config) | {"window": window, "layer_types": types}

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and the window."""
        windowed = LayerType.window in options.layer_types
        return super().write(options) | {"sliding_window": options.window if windowed else None}


FAMILY = Mistral()
