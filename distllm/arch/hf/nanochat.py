"""NanoChat: norms without gains, behind the embedding too; queries and keys turn the other way and are normalised last."""

from typing import Any

from distllm.arch.hf.causal import SETTINGS, TINY, CausalFamily, classes
from distllm.arch.hf.rules import Rule, same
from distllm.arch.options import QKNorm


class NanoChat(CausalFamily):
    """NanoChat in all sizes."""

    model_type = "nanochat"
    architectures = classes("NanoChat")
    tiny = {
        **{k: v for k, v in TINY.items() if k != "head_dim"},
        "final_logit_softcapping": 5.0,
    }
    settings = {**SETTINGS, "final_logit_softcapping": "logit_softcap"}
    defaults = {
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "final_logit_softcapping": 15.0,
        "hidden_act": "relu2",
    }
    fixed = {
        "norm_gain": False,
        "embedding_norm": True,
        "rope_sign": -1,
        "qk_norm": QKNorm.head,
        "qk_norm_after_rope": True,
        "gated": False,
    }

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        bias = bool(config.get("attention_bias", False))
        return super().read(config) | {"qkv_bias": bias, "out_bias": bias}

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        return super().write(options) | {"attention_bias": options.qkv_bias}

    def feed_forward_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the two matrices are translated."""
        return [
            same(f"{theirs}mlp.fc1.weight", f"{ours}feed_forward.up_proj.weight"),
            same(f"{theirs}mlp.fc2.weight", f"{ours}feed_forward.down_proj.weight"),
        ]


FAMILY = NanoChat()
