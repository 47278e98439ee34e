"""T5, T5 v1.1, Flan-T5 and UL2: relative positions, RMS norms, no biases, attention scores not scaled.

What tells the first T5 from its successors in a file: `feed_forward_proj`, whether what enters the output matrix is scaled
(`scale_decoder_outputs`, or the old `tie_word_embeddings`), and whether there is an `lm_head.weight` of its own. The
config of a model that transformers 5 wrote says that it is tied whether it is or not, so the tensors decide.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from distllm.arch.encoder_decoder import EncoderDecoderOptions
from distllm.arch.hf.family import Family
from distllm.arch.hf.rules import Rule, same
from distllm.arch.options import Activation, Position, resolve_d_head
from distllm.errors import CheckpointError

LONGEST = 2048
"""Positions are relative and have no end; this many tokens are taken at least."""

_FEED_FORWARD = {
    "relu": (False, Activation.relu),
    "gated-gelu": (True, Activation.gelu_tanh),
    "gated-silu": (True, Activation.silu),
    "gated-relu": (True, Activation.relu),
    "gelu": (False, Activation.gelu),
}
"""Their word -> (gated, activation). `gated-gelu` is the tanh form."""

HEADS = {
    "lm": {"lm_head.weight": "head.weight"},
    "likelihood": {"lm_head.weight": "head.weight"},
    "none": {},
    "last": {"score.weight": "head.weight"},
    "classify": {"score.weight": "head.weight"},
    "tag": {"score.weight": "head.weight", "score.bias": "head.bias"},
    "value": {"value.weight": "head.weight", "value.bias": "head.bias"},
}
"""Head -> their name -> ours. Only the language model has a class of this form in transformers."""


def classes(stem: str, lm: str) -> dict[str, str]:
    """Name the classes of an encoder-decoder family; heads that transformers does not have get names of our own."""
    return {
        "lm": lm,
        "likelihood": lm,
        "none": f"{stem}Model",
        "last": "DistllmSeq2SeqScoreModel",
        "classify": "DistllmSeq2SeqClassifyModel",
        "tag": "DistllmSeq2SeqTagModel",
        "value": "DistllmSeq2SeqValueModel",
    }


class T5(Family):
    """T5 in all versions."""

    model_type = "t5"
    arch = "encoder_decoder"
    options_class = EncoderDecoderOptions
    architectures = classes("T5", "T5ForConditionalGeneration")
    tiny = {
        "vocab_size": 97, "d_model": 64, "d_kv": 8, "num_heads": 4, "d_ff": 96, "num_layers": 2,
        "num_decoder_layers": 3, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 14,
        "decoder_start_token_id": 0,
    }  # fmt: skip
    settings = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "d_kv": "d_head",
        "d_ff": "d_ff",
        "num_layers": "n_layers",
        "num_decoder_layers": "n_decoder_layers",
        "num_heads": "n_heads",
        "relative_attention_num_buckets": "relative_buckets",
        "relative_attention_max_distance": "relative_max_distance",
        "layer_norm_epsilon": "norm_eps",
        "dropout_rate": "dropout",
        "distllm_init_std": "init_std",
    }
    defaults = {
        "d_kv": 64,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "feed_forward_proj": "relu",
        "distllm_init_std": 0.02,
    }
    fixed = {"position": Position.relative, "attention_scale": 1.0}
    base_prefix = ""
    activation_key = "dense_act_fn"

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return feed-forward, scaling and tying, the last as far as the config tells."""
        kind = config["feed_forward_proj"]
        if kind not in _FEED_FORWARD:
            raise CheckpointError(
                f"config.json has feed_forward_proj={kind}; readable are {', '.join(_FEED_FORWARD)}."
            )
        gated, activation = _FEED_FORWARD[kind]
        tied = config.get("tie_word_embeddings", True) is not False
        scaled = config.get("scale_decoder_outputs", tied)
        decoder_layers = config.get("num_decoder_layers")
        start = config.get("decoder_start_token_id")
        return {
            "gated": gated,
            "activation": activation,
            "tie_embeddings": tied and scaled,
            "logit_scale": config["d_model"] ** -0.5 if scaled else 1.0,
            "n_kv_heads": config["num_heads"],
            "n_decoder_layers": None if decoder_layers == config["num_layers"] else decoder_layers,
            "decoder_start_id": 0 if start is None else start,
            "max_seq_len": config.get(
                "distllm_max_seq_len", max(config.get("n_positions", 0), LONGEST)
            ),
        }

    def from_hf(
        self, config: Mapping[str, Any], tensors: Mapping[str, Tensor], head: str | None = None
    ) -> tuple[Any, dict[str, Tensor], str]:
        """Translate; a language model is tied where the file has no output matrix of its own."""
        if self.head_of(config) in ("lm", "likelihood"):
            own, shared = tensors.get("lm_head.weight"), tensors.get("shared.weight")
            copy = own is not None and shared is not None and torch.equal(own, shared)
            config = {**config, "distllm_tied": own is None or copy}
        return super().from_hf(config, tensors, head)

    def read_options(self, config: Mapping[str, Any]) -> Any:
        """Translate config.json to options."""
        options = super().read_options(config)
        if "distllm_tied" in config:  # written by us, and right for every head
            return replace(options, tie_embeddings=config["distllm_tied"])
        return options

    def write(self, options: Any) -> dict[str, Any]:
        """Return feed-forward, scaling and tying in both spellings."""
        pair = (options.gated, options.activation)
        words = [word for word, known in _FEED_FORWARD.items() if known == pair]
        if not words:
            raise CheckpointError(f"T5 has no feed-forward layer with gated={pair[0]}, {pair[1]}.")
        scaled = options.logit_scale != 1.0
        act = words[0].removeprefix("gated-")
        return {
            "feed_forward_proj": words[0],
            "is_gated_act": options.gated,
            "dense_act_fn": "gelu_new" if words[0] == "gated-gelu" else act,
            "tie_word_embeddings": scaled,
            "scale_decoder_outputs": scaled,
            "distllm_tied": options.tie_embeddings,
            "d_kv": resolve_d_head(options),
            "num_decoder_layers": options.n_decoder_layers or options.n_layers,
            "n_positions": options.max_seq_len,
            "distllm_max_seq_len": options.max_seq_len,
            "decoder_start_token_id": options.decoder_start_id,
            "is_encoder_decoder": True,
        }

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""
        rules = [same("shared.weight", "embed.weight")]
        for side in ("encoder", "decoder"):
            blocks = options.n_layers
            if side == "decoder":
                blocks = options.n_decoder_layers or blocks
            rules += [
                same(
                    f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                    f"{side}.relative_bias.weight",
                ),
                same(f"{side}.final_layer_norm.weight", f"{side}.final_norm.weight"),
            ]
            for i in range(blocks):
                rules += _block(options, side, i)
        if options.tie_embeddings and head in ("lm", "likelihood"):
            return rules
        return rules + [same(theirs, ours) for theirs, ours in HEADS[head].items()]

    def ignored(self, name: str, options: Any) -> bool:
        """True for the copies of the embedding that old files hold."""
        copies = ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tied = options.tie_embeddings and name == "lm_head.weight"
        return name in copies or name == unused or tied


def _block(options: Any, side: str, i: int) -> list[Rule]:
    theirs, ours = f"{side}.block.{i}.layer.", f"{side}.layers.{i}."
    parts = [("0", "SelfAttention", "attention")]
    if side == "decoder":
        parts.append(("1", "EncDecAttention", "cross_attention"))
    rules = []
    for place, name, here in parts:
        rules.append(same(f"{theirs}{place}.layer_norm.weight", f"{ours}{here}_norm.weight"))
        rules += [
            same(f"{theirs}{place}.{name}.{x}.weight", f"{ours}{here}.{y}_proj.weight")
            for x, y in (("q", "q"), ("k", "k"), ("v", "v"), ("o", "out"))
        ]
    last = str(len(parts))
    matrices = {"wo": "down"} | ({"wi_0": "gate", "wi_1": "up"} if options.gated else {"wi": "up"})
    return [
        *rules,
        same(f"{theirs}{last}.layer_norm.weight", f"{ours}feed_forward_norm.weight"),
        *(
            same(f"{theirs}{last}.DenseReluDense.{x}.weight", f"{ours}feed_forward.{y}_proj.weight")
            for x, y in matrices.items()
        ),
    ]


FAMILY = T5()
