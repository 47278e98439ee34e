"""ModernBERT: pre-norm without biases, rotary positions of two bases, windows in two of three layers, GeGLU.

The embedding is normalised, so the first block's attention has no norm. Queries, keys and values are one matrix, as are
the two that the feed-forward layer multiplies (the activated one first).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.arch.encoder import EncoderOptions
from distllm.arch.hf.family import Family, expand_layer_types, shorten_layer_types
from distllm.arch.hf.rope import read_rope_by_type, write_rope_by_type
from distllm.arch.hf.rules import Rule, fused, same
from distllm.arch.options import Placement, Pooler, Position
from distllm.errors import CheckpointError


class ModernBert(Family):
    """ModernBERT in all sizes."""

    model_type = "modernbert"
    arch = "encoder"
    options_class = EncoderOptions
    architectures = {
        "lm": "ModernBertForMaskedLM",
        "classify": "ModernBertForSequenceClassification",
        "last": "ModernBertForSequenceClassification",
        "tag": "ModernBertForTokenClassification",
        "none": "ModernBertModel",
        "value": "DistllmValueModel",
    }
    tiny = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
        "local_attention": 10,
        "pad_token_id": 1,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 900.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 60.0},
        },
    }
    settings = {
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "norm_eps": "norm_eps",
        "norm_bias": "norm_bias",
        "initializer_range": "init_std",
        "tie_word_embeddings": "tie_embeddings",
        "mlp_bias": "ff_bias",
        "decoder_bias": "head_bias",
        "classifier_bias": "transform_bias",
        "mlp_dropout": "dropout",
    }
    defaults = {
        "norm_eps": 1e-5,
        "norm_bias": False,
        "mlp_bias": False,
        "attention_bias": False,
        "decoder_bias": True,
        "classifier_bias": False,
        "tie_word_embeddings": True,
        "local_attention": 128,
        "hidden_activation": "gelu",
        "classifier_activation": "gelu",
        "classifier_pooling": "cls",
    }
    fixed = {
        "norm_placement": Placement.pre,
        "skip_first_norm": True,
        "position": Position.rotary,
        "token_types": 0,
        "gated": True,
        "pooler": Pooler.transform,
    }
    activation_key = "hidden_activation"

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return biases, pooling, rotary settings, windows and types of layers."""
        if config["classifier_activation"] != config["hidden_activation"]:
            raise CheckpointError(
                f"config.json has classifier_activation={config['classifier_activation']} beside "
                f"hidden_activation={config['hidden_activation']}; readable are equal ones."
            )
        every = config.get("global_attn_every_n_layers", 3)
        types = config.get("layer_types") or [
            "sliding_attention" if i % every else "full_attention"
            for i in range(config["num_hidden_layers"])
        ]
        bias = bool(config["attention_bias"])
        return {
            "n_kv_heads": config["num_attention_heads"],
            "qkv_bias": bias,
            "out_bias": bias,
            "pooling": {"cls": "first", "mean": "mean"}[config["classifier_pooling"]],
            # Half of it to each side, and the token itself.
            "window": config["local_attention"] // 2 + 1,
            "layer_types": shorten_layer_types(types),
            **read_rope_by_type(
                config, 160000.0, 10000.0, ("global_rope_theta", "local_rope_theta")
            ),
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return what `read` reads."""
        return {
            "attention_bias": options.qkv_bias,
            "classifier_pooling": "mean" if options.pooling == "mean" else "cls",
            "classifier_activation": "gelu",
            "local_attention": 128 if options.window is None else 2 * (options.window - 1),
            "layer_types": expand_layer_types(options),
            "attention_dropout": 0.0,
            "embedding_dropout": 0.0,
            **write_rope_by_type(options),
        }

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""
        base = self.base_prefix
        rules = [same(f"{base}embeddings.tok_embeddings.weight", "embed.weight")]
        norms = ("weight", "bias") if options.norm_bias else ("weight",)
        for kind in norms:
            rules.append(same(f"{base}embeddings.norm.{kind}", f"embed_norm.{kind}"))
            rules.append(same(f"{base}final_norm.{kind}", f"final_norm.{kind}"))
        for i in range(options.n_layers):
            theirs, ours = f"{base}layers.{i}.", f"layers.{i}."
            for kind in norms:
                rules.append(same(f"{theirs}mlp_norm.{kind}", f"{ours}feed_forward_norm.{kind}"))
                if i:
                    rules.append(same(f"{theirs}attn_norm.{kind}", f"{ours}attention_norm.{kind}"))
            for kind in ("weight", "bias") if options.qkv_bias else ("weight",):
                parts = [f"{ours}attention.{x}_proj.{kind}" for x in "qkv"]
                rules.append(fused(f"{theirs}attn.Wqkv.{kind}", parts))
                rules.append(same(f"{theirs}attn.Wo.{kind}", f"{ours}attention.out_proj.{kind}"))
            for kind in ("weight", "bias") if options.ff_bias else ("weight",):
                parts = [f"{ours}feed_forward.{x}_proj.{kind}" for x in ("gate", "up")]
                rules.append(fused(f"{theirs}mlp.Wi.{kind}", parts))
                rules.append(same(f"{theirs}mlp.Wo.{kind}", f"{ours}feed_forward.down_proj.{kind}"))
        return rules + self._head_rules(options, head)

    def _head_rules(self, options: Any, head: str) -> list[Rule]:
        if head == "none":
            return []
        if head == "value":
            return [same(f"value.{kind}", f"head.{kind}") for kind in ("weight", "bias")]
        rules = [
            same(f"head.dense.{kind}", f"head.transform.dense.{kind}")
            for kind in (("weight", "bias") if options.transform_bias else ("weight",))
        ]
        rules += [
            same(f"head.norm.{kind}", f"head.transform.norm.{kind}")
            for kind in (("weight", "bias") if options.norm_bias else ("weight",))
        ]
        if head != "lm":
            return rules + [same(f"classifier.{k}", f"head.{k}") for k in ("weight", "bias")]
        if options.head_bias:
            rules.append(same("decoder.bias", "head.bias"))
        if not options.tie_embeddings:
            rules.append(same("decoder.weight", "head.weight"))
        return rules

    def ignored(self, name: str, options: Any) -> bool:
        """True for the tied copy of the embedding."""
        return options.tie_embeddings and name == "decoder.weight"


FAMILY = ModernBert()
