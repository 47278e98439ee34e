"""Qwen3 with experts: a softmax over all, of which the best are taken. On disk every expert's matrices stand alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from distllm.arch.hf.causal import SETTINGS, TINY, classes
from distllm.arch.hf.qwen3 import Qwen3
from distllm.arch.hf.rules import Rule, same
from distllm.arch.options import has_experts


class Qwen3Moe(Qwen3):
    """Qwen3 30B-A3B and 235B-A22B."""

    model_type = "qwen3_moe"
    architectures = classes("Qwen3Moe")
    tiny = {
        **TINY,
        "head_dim": 24,
        "moe_intermediate_size": 32,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    }
    settings = {
        **SETTINGS,
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "experts_per_token",
        "moe_intermediate_size": "d_expert",
        "norm_topk_prob": "router_renormalise",
        "router_aux_loss_coef": "balance_coef",
        "distllm_router_z_coef": "router_z_coef",
    }
    defaults = {
        **Qwen3.defaults,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
        "router_aux_loss_coef": 0.001,
    }

    def read_options(self, config: Any) -> Any:
        """Translate config.json, in which transformers before 5 say `num_experts`."""
        if "num_experts" in config:
            config = {"num_local_experts": config["num_experts"], **config}
        return super().read_options(config)

    def read(self, config: Any) -> dict[str, Any]:
        """Return what Qwen3 has (here a window is for all layers or none), and which layers are dense."""
        window = config.get("sliding_window") if config.get("use_sliding_window") else None
        step = config.get("decoder_sparse_step", 1)
        dense = set(config.get("mlp_only_layers") or [])
        dense |= {i for i in range(config["num_hidden_layers"]) if (i + 1) % step}
        return super().read({**config, "layer_types": None, "max_window_layers": 0}) | {
            "window": window,
            "dense_layers": sorted(dense),
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return what Qwen3 has, and which layers are dense."""
        config = super().write(options)
        del config["layer_types"], config["max_window_layers"]
        config["num_experts"] = options.num_experts  # read by transformers before 5
        return config | {"mlp_only_layers": list(options.dense_layers), "decoder_sparse_step": 1}

    def feed_forward_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the router and the experts are translated."""
        if not has_experts(options, int(ours.split(".")[1])):
            return super().feed_forward_rules(options, theirs, ours)
        each = [f"{theirs}mlp.experts.{e}." for e in range(options.num_experts)]
        return [
            same(f"{theirs}mlp.gate.weight", f"{ours}feed_forward.router.weight"),
            Rule(
                tuple(f"{e}{x}_proj.weight" for e in each for x in ("gate", "up")),
                (f"{ours}feed_forward.gate_up_proj",),
                _stack_pairs,
                _split_pairs,
            ),
            Rule(
                tuple(f"{e}down_proj.weight" for e in each),
                (f"{ours}feed_forward.down_proj",),
                lambda tensors: [torch.stack(list(tensors))],
                lambda tensors: list(tensors[0].unbind()),
            ),
        ]


def _stack_pairs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """[gate, up, gate, up, ...], each [d_expert, d_model] -> [num_experts, 2 d_expert, d_model]."""
    return [torch.stack(list(tensors)).unflatten(0, (-1, 2)).flatten(1, 2)]


def _split_pairs(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return list(tensors[0].unflatten(1, (2, -1)).flatten(0, 1).unbind())


FAMILY = Qwen3Moe()
