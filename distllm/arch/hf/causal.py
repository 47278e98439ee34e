"""What the decoder families share that took over Llama's names of settings and tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.arch.decoder import DecoderOptions
from distllm.arch.hf.family import Family
from distllm.arch.hf.rope import read_rope, write_rope
from distllm.arch.hf.rules import Rule, same
from distllm.arch.options import QKNorm, resolve_d_head

SETTINGS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "head_dim": "d_head",
    "intermediate_size": "d_ff",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
    "initializer_range": "init_std",
    "distllm_dropout": "dropout",
}
"""Their name -> ours."""

TINY = {
    "vocab_size": 97,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "max_position_embeddings": 160,
    "tie_word_embeddings": False,
}
"""Settings of a small model."""

_LM = {"lm_head.weight": "head.weight"}
HEAD_TENSORS = {
    "lm": _LM,
    "likelihood": _LM,
    "none": {},
    "last": {"score.weight": "head.weight"},
    "classify": {"score.weight": "head.weight"},
    "tag": {"score.weight": "head.weight", "score.bias": "head.bias"},
    "value": {"value.weight": "head.weight", "value.bias": "head.bias"},
}
"""Head -> their name -> ours."""


def classes(stem: str, lm: str = "") -> dict[str, str]:
    """Name the classes of a decoder family in transformers.

    Two heads have none there: a value model is `DistllmValueModel`, and a language model used as a judge is a plain
    causal model with `distllm_head: likelihood` in its config.
    """
    causal = lm or f"{stem}ForCausalLM"
    return {
        "lm": causal,
        "likelihood": causal,
        "last": f"{stem}ForSequenceClassification",
        "classify": f"{stem}ForSequenceClassification",
        "tag": f"{stem}ForTokenClassification",
        "none": f"{stem}Model",
        "value": "DistllmValueModel",
    }


class CausalFamily(Family):
    """A decoder family with Llama's names."""

    arch = "decoder"
    options_class = DecoderOptions
    settings = SETTINGS
    defaults: Mapping[str, Any] = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    norm_names: Mapping[str, str] = {
        "attention_norm": "input_layernorm",
        "feed_forward_norm": "post_attention_layernorm",
    }
    """Our norm of a block -> theirs."""
    theta = 10000.0
    """Base of the rotary wavelengths where none is given."""

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return heads and rotary settings."""
        given = read_rope(config, self.theta)
        if config.get("num_key_value_heads") is None:
            given["n_kv_heads"] = config["num_attention_heads"]
        return given

    def write(self, options: Any) -> dict[str, Any]:
        """Return heads and rotary settings."""
        return {
            "head_dim": resolve_d_head(options),
            "attention_dropout": 0.0,
            **write_rope(options),
        }

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""
        prefix = self.base_prefix
        rules = [same(f"{prefix}embed_tokens.weight", "embed.weight")]
        if options.norm_gain:
            rules.append(same(f"{prefix}norm.weight", "final_norm.weight"))
        for layer in range(options.n_layers):
            rules += self.block_rules(options, f"{prefix}layers.{layer}.", f"layers.{layer}.")
        return rules + self.head_rules(options, head)

    def head_rules(self, options: Any, head: str) -> list[Rule]:
        """Return how the tensors of the head are translated."""
        if options.tie_embeddings and head in ("lm", "likelihood"):
            return []
        return [same(theirs, ours) for theirs, ours in HEAD_TENSORS[head].items()]

    def block_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the tensors of one block are translated."""
        rules = []
        if options.norm_gain:
            rules += [
                same(f"{theirs}{there}.weight", f"{ours}{here}.weight")
                for here, there in self.norm_names.items()
            ]
        kinds = ["weight", "bias"] if options.qkv_bias else ["weight"]
        rules += [
            same(f"{theirs}self_attn.{x}_proj.{kind}", f"{ours}attention.{x}_proj.{kind}")
            for x in "qkv"
            for kind in kinds
        ]
        rules += [
            same(f"{theirs}self_attn.o_proj.{kind}", f"{ours}attention.out_proj.{kind}")
            for kind in (["weight", "bias"] if options.out_bias else ["weight"])
        ]
        if options.qk_norm != QKNorm.none and options.norm_gain:
            rules += [
                same(f"{theirs}self_attn.{x}_norm.weight", f"{ours}attention.{x}_norm.weight")
                for x in "qk"
            ]
        return rules + self.feed_forward_rules(options, theirs, ours)

    def feed_forward_rules(self, options: Any, theirs: str, ours: str) -> list[Rule]:
        """Return how the tensors of one feed-forward layer are translated."""
        return [
            same(f"{theirs}mlp.{x}_proj.{kind}", f"{ours}feed_forward.{x}_proj.{kind}")
            for x in ("gate", "up", "down")
            for kind in (["weight", "bias"] if options.ff_bias else ["weight"])
        ]

    def ignored(self, name: str, options: Any) -> bool:
        """True for the tied copy of the embedding, and for computed frequencies, which old files hold."""
        tied = options.tie_embeddings and name == "lm_head.weight"
        return tied or name.endswith("rotary_emb.inv_freq")


SANDWICH_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_out_norm": "post_attention_layernorm",
    "feed_forward_norm": "pre_feedforward_layernorm",
    "feed_forward_out_norm": "post_feedforward_layernorm",
}
"""As in Gemma 2 and 3."""
