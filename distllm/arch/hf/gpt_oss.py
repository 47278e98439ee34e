"""GPT-OSS: experts with clamped gates, a sink per head, windows in every other layer, wavelengths stretched by YaRN.

On disk experts are stacked and stored (in, out), with the columns of gate and up taking turns. Released files hold them in
MXFP4: `mxfp4.py` unpacks those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distllm.arch.hf.causal import SETTINGS, TINY, CausalFamily, classes
from distllm.arch.hf.family import expand_layer_types, shorten_layer_types
from distllm.arch.hf.mxfp4 import unpack_all
from distllm.arch.hf.rules import Rule, same

_YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Where config.json gives no rotary settings."""


class GptOss(CausalFamily):
    """GPT-OSS 20B and 120B."""

    model_type = "gpt_oss"
    architectures = classes("GptOss")
    tiny = {
        **TINY,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "intermediate_size": 32,
        "sliding_window": 7,
        "swiglu_limit": 1.5,
        "rope_parameters": {
            **_YARN,
            "rope_theta": 5000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 40,
        },
    }
    settings = {
        **SETTINGS,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "experts_per_token",
        "sliding_window": "window",
        "swiglu_limit": "expert_clamp",
        "swiglu_alpha": "expert_alpha",
        "router_aux_loss_coef": "balance_coef",
        "distllm_router_z_coef": "router_z_coef",
    }
    defaults = {
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": 128,
        "swiglu_limit": 7.0,
        "swiglu_alpha": 1.702,
        "num_experts_per_tok": 4,
        "head_dim": 64,
        "router_aux_loss_coef": 0.001,
    }
    constants = {"attention_bias": True, "hidden_act": "silu"}
    fixed = {
        "qkv_bias": True,
        "out_bias": True,
        "attention_sinks": True,
        "router_top_first": True,
        "router_bias": True,
        "expert_bias": True,
    }
    theta = 150000.0

    def read(self, config: Any) -> dict[str, Any]:
        """Return heads, rotary settings and types of layers."""
        if not (config.get("rope_parameters") or config.get("rope_scaling")):
            config = {**config, "rope_parameters": _YARN}
        pair = ("sliding_attention", "full_attention")
        types = config.get("layer_types") or [
            pair[i % 2] for i in range(config["num_hidden_layers"])
        ]
        return super().read(config) | {"layer_types": shorten_layer_types(types)}

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads, rotary settings and types of layers."""
        return super().write(options) | {"layer_types": expand_layer_types(options)}

    def block_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the tensors of one block are translated."""
        sinks = same(f"{theirs}self_attn.sinks", f"{ours}attention.sinks")
        return [*super().block_rules(options, theirs, ours), sinks]

    def feed_forward_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the router and the experts are translated."""
        theirs, ours = f"{theirs}mlp.", f"{ours}feed_forward."
        return [
            same(f"{theirs}router.weight", f"{ours}router.weight"),
            same(f"{theirs}router.bias", f"{ours}router.bias"),
            Rule((f"{theirs}experts.gate_up_proj",), (f"{ours}gate_up_proj",), _load, _store),
            Rule((f"{theirs}experts.gate_up_proj_bias",), (f"{ours}gate_up_bias",), _part, _mix),
            Rule((f"{theirs}experts.down_proj",), (f"{ours}down_proj",), _turn, _turn),
            same(f"{theirs}experts.down_proj_bias", f"{ours}down_bias"),
        ]

    def renamed(self, tensors: Mapping[str, Tensor], known: set[str]) -> Mapping[str, Tensor]:
        """Unpack MXFP4, and add the prefix where it is left out."""
        return super().renamed(unpack_all(tensors), known)


def _turn(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0].transpose(1, 2)]


def _part(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gate and up taking turns along dim 1 -> all of gate, then all of up."""
    return [torch.cat((tensors[0][:, ::2], tensors[0][:, 1::2]), dim=1)]


def _mix(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    gate, up = tensors[0].chunk(2, dim=1)
    return [torch.stack((gate, up), dim=2).flatten(1, 2)]


def _load(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return _part(_turn(tensors))


def _store(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return _turn(_mix(tensors))


FAMILY = GptOss()
