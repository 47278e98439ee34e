"""Gemma 3, the language model: Gemma 2 with normalised queries and keys instead of soft-caps, two rotary bases."""

from typing import Any

from distllm.arch.hf.causal import TINY, classes
from distllm.arch.hf.gemma2 import Gemma2
from distllm.arch.hf.rope import read_rope_by_type, write_rope_by_type
from distllm.arch.options import QKNorm


class Gemma3(Gemma2):
    """Gemma 3 without its picture encoder."""

    model_type = "gemma3_text"
    architectures = {
        **classes("Gemma3"),
        "last": "Gemma3TextForSequenceClassification",
        "classify": "Gemma3TextForSequenceClassification",
        "none": "Gemma3TextModel",
    }
    tiny = {
        **TINY,
        "head_dim": 24,
        "query_pre_attn_scalar": 40,
        "sliding_window": 7,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 6,
        "tie_word_embeddings": True,
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
        },
    }
    settings = {
        k: v for k, v in Gemma2.settings.items() if k != "attn_logit_softcapping"
    }  # their attention does not read it
    defaults = {**Gemma2.defaults, "final_logit_softcapping": None}
    constants = {"use_bidirectional_attention": False, "attn_logit_softcapping": None}
    fixed = {**Gemma2.fixed, "qk_norm": QKNorm.head}

    def read(self, config: Any) -> dict[str, Any]:
        """Return what Gemma 2 has, and rotary settings of two kinds of layers."""
        rope = read_rope_by_type(config, theta=1e6, local_theta=1e4)
        flat = {k: v for k, v in config.items() if k not in ("rope_parameters", "rope_scaling")}
        return super().read(flat) | rope

    def write(self, options: Any) -> dict[str, Any]:
        """Return what Gemma 2 has, and rotary settings of two kinds of layers."""
        config = super().write(options) | write_rope_by_type(options)
        del config["rope_theta"]
        return config

    def usual_types(self, config: Any) -> list[str]:
        """Return the types of layers where none are given: five windowed, one full, ..."""
        every = config.get("sliding_window_pattern", 6)
        return [
            "sliding_attention" if (i + 1) % every else "full_attention"
            for i in range(config["num_hidden_layers"])
        ]


FAMILY = Gemma3()
