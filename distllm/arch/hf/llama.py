"""Llama: pre-norm RMS, rotary positions, grouped key/value heads, SwiGLU."""

from typing import Any

from distllm.arch.hf.causal import TINY, CausalFamily, classes


class Llama(CausalFamily):
    """Llama 1 to 3.3, and what has the same layout."""

    model_type = "llama"
    architectures = classes("Llama")
    tiny = {
        **TINY,
        "rms_norm_eps": 1e-5,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    }

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        bias = bool(config.get("attention_bias", False))
        return super().read(config) | {
            "qkv_bias": bias,
            "out_bias": bias,
            "ff_bias": bool(config.get("mlp_bias", False)),
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and biases."""
        return super().write(options) | {
            "attention_bias": options.qkv_bias,
            "mlp_bias": options.ff_bias,
        }


FAMILY = Llama()
