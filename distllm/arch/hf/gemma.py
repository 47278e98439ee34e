"""Gemma: gains are stored as their distance from 1, embeddings are scaled by sqrt(d_model), GeGLU with the tanh GELU."""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes
from distllm.arch.options import Activation

GEMMA_DEFAULTS = {
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "head_dim": 256,
    "use_bidirectional_attention": None,
}


class Gemma(CausalFamily):
    """The first Gemma; its successors change what `gemma2.py` and `gemma3_text.py` say."""

    model_type = "gemma"
    architectures = classes("Gemma")
    tiny = {**TINY, "head_dim": 24, "tie_word_embeddings": True}
    defaults = GEMMA_DEFAULTS
    constants = {"use_bidirectional_attention": None}
    fixed = {"norm_gain_offset": 1.0}
    activation_names = {"gelu_tanh": "gelu_pytorch_tanh"}

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings, biases and the embedding's scale."""
        bias = bool(config.get("attention_bias", False))
        return super().read(config) | {
            "qkv_bias": bias,
            "out_bias": bias,
            "embedding_scale": config["hidden_size"] ** 0.5,
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        return super().write(options) | {"attention_bias": options.qkv_bias}

    def _activation(self, name: str) -> Activation:
        """Take `gelu`, which the first releases say, for what they were trained with."""
        return Activation.gelu_tanh if name == "gelu" else super()._activation(name)


FAMILY = Gemma()
