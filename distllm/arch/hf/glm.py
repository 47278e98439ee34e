"""GLM-4, the causal chat model: interleaved rotary pairs in half of each head, biases on queries, keys and values.

The first GLM, a prefix language model, is another architecture: `arch/glm.py`.
"""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes
from distllm.arch.hf.rules import Rule, fused, same
from distllm.arch.options import RopeStyle


class Glm(CausalFamily):
    """GLM-4 9B."""

    model_type = "glm"
    architectures = classes("Glm")
    tiny = {**TINY, "rms_norm_eps": 1.5625e-7, "pad_token_id": 0}
    defaults = {
        "rms_norm_eps": 1.5625e-7,
        "tie_word_embeddings": False,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "attention_bias": True,
        "partial_rotary_factor": 0.5,
    }
    fixed = {"rope_style": RopeStyle.interleaved}

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        return super().read(config) | {"qkv_bias": bool(config["attention_bias"])}

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        return super().write(options) | {"attention_bias": options.qkv_bias}

    def feed_forward_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the matrices are translated; gate and up are one, gate first."""
        parts = [f"{ours}feed_forward.{x}_proj.weight" for x in ("gate", "up")]
        return [
            fused(f"{theirs}mlp.gate_up_proj.weight", parts),
            same(f"{theirs}mlp.down_proj.weight", f"{ours}feed_forward.down_proj.weight"),
        ]


FAMILY = Glm()
