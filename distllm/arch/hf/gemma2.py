"""Gemma 2: Gemma with norms on both sides of every part, soft-capped scores and logits, a window in every other layer."""

from typing import Any

from distllm.arch.hf.causal import SANDWICH_NORMS, SETTINGS, TINY, classes
from distllm.arch.hf.family import expand_layer_types, shorten_layer_types
from distllm.arch.hf.gemma import GEMMA_DEFAULTS, Gemma
from distllm.arch.options import Placement, resolve_d_head


class Gemma2(Gemma):
    """Gemma 2 in all sizes."""

    model_type = "gemma2"
    architectures = classes("Gemma2")
    tiny = {
        **TINY,
        "head_dim": 24,
        "query_pre_attn_scalar": 40,
        "sliding_window": 7,
        "attn_logit_softcapping": 4.0,
        "final_logit_softcapping": 5.0,
        "tie_word_embeddings": True,
    }
    settings = {
        **SETTINGS,
        "sliding_window": "window",
        "attn_logit_softcapping": "attention_softcap",
        "final_logit_softcapping": "logit_softcap",
    }
    defaults = {
        **GEMMA_DEFAULTS,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    }
    fixed = {**Gemma.fixed, "norm_placement": Placement.sandwich}
    norm_names = SANDWICH_NORMS
    activation_key = "hidden_activation"

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings, biases, scales and types of layers."""
        types = config.get("layer_types") or self.usual_types(config)
        return super().read(config) | {
            "layer_types": shorten_layer_types(types),
            "attention_scale": config["query_pre_attn_scalar"] ** -0.5,
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings, biases, scales and types of layers."""
        scale = options.attention_scale
        return super().write(options) | {
            "layer_types": expand_layer_types(options),
            "query_pre_attn_scalar": resolve_d_head(options) if scale is None else round(scale**-2),
        }

    def usual_types(self, config: Any) -> list[str]:
        """Return the types of layers where none are given: windowed, full, windowed, ..."""
        pair = ("sliding_attention", "full_attention")
        return [pair[i % 2] for i in range(config["num_hidden_layers"])]


FAMILY = Gemma2()
