"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values, windows in the upper layers if at all."""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes
from distllm.arch.hf.family import expand_layer_types, shorten_layer_types
from distllm.arch.options import LayerType


class Qwen2(CausalFamily):
    """Qwen2 and Qwen2.5, dense."""

    model_type = "qwen2"
    architectures = classes("Qwen2")
    tiny = {
        **{k: v for k, v in TINY.items() if k != "head_dim"},
        "use_sliding_window": True,
        "sliding_window": 7,
        "max_window_layers": 2,
        "tie_word_embeddings": True,
    }
    fixed = {"qkv_bias": True}

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and windows."""
        return super().read(config) | read_windows(config)

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and windows."""
        return super().write(options) | write_windows(options)


def read_windows(config: Any) -> dict[str, Any]:
    """Read `window` and `layer_types`; a window that is switched off does not count."""
    window = config.get("sliding_window", 4096) if config.get("use_sliding_window") else None
    types = config.get("layer_types")
    if types is None:
        first = config.get("max_window_layers", 28)
        types = [
            "sliding_attention" if window is not None and i >= first else "full_attention"
            for i in range(config["num_hidden_layers"])
        ]
    ours = shorten_layer_types(types)
    return {"layer_types": ours, "window": window if LayerType.window in ours else None}


def write_windows(options: Any) -> dict[str, Any]:
    """Write what `read_windows` reads."""
    types = expand_layer_types(options)
    windowed = "sliding_attention" in types
    return {
        "layer_types": types,
        "use_sliding_window": windowed,
        "sliding_window": options.window if windowed else None,
        "max_window_layers": types.index("sliding_attention") if windowed else len(types),
    }


FAMILY = Qwen2()
