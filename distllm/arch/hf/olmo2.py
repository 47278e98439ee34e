"""OLMo 2: what attention and feed-forward return is normalised, and all queries and keys together are."""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes
from distllm.arch.options import Placement, QKNorm


class Olmo2(CausalFamily):
    """OLMo 2 in all sizes."""

    model_type = "olmo2"
    architectures = classes("Olmo2")
    tiny = {k: v for k, v in TINY.items() if k != "head_dim"}
    defaults = {"rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    fixed = {"norm_placement": Placement.output, "qk_norm": QKNorm.full}
    norm_names = {
        "attention_norm": "post_attention_layernorm",
        "feed_forward_norm": "post_feedforward_layernorm",
    }

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        bias = bool(config.get("attention_bias", False))
        return super().read(config) | {"qkv_bias": bias, "out_bias": bias}

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        return super().write(options) | {"attention_bias": options.qkv_bias}


FAMILY = Olmo2()
