"""BART: post-norm blocks with biases everywhere, learned positions that begin at row 2, the embeddings normalised.

Marian, which differs in few points, is in `marian.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distllm.arch.encoder_decoder import EncoderDecoderOptions
from distllm.arch.hf.family import Family
from distllm.arch.hf.rules import Rule, same
from distllm.arch.hf.t5 import HEADS, classes
from distllm.arch.options import Norm, Placement, Position
from distllm.errors import CheckpointError


class Bart(Family):
    """BART in all sizes."""

    model_type = "bart"
    arch = "encoder_decoder"
    options_class = EncoderDecoderOptions
    architectures = classes("Bart", "BartForConditionalGeneration")
    tiny = {
        "vocab_size": 97, "d_model": 64, "encoder_layers": 2, "decoder_layers": 3, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 96, "decoder_ffn_dim": 96, "max_position_embeddings": 160,
        "scale_embedding": True,
    }  # fmt: skip
    settings = {
        "vocab_size": "vocab_size",
        "d_model": "d_model",
        "encoder_layers": "n_layers",
        "encoder_attention_heads": "n_heads",
        "encoder_ffn_dim": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "tie_word_embeddings": "tie_embeddings",
        "decoder_start_token_id": "decoder_start_id",
        "dropout": "dropout",
        "init_std": "init_std",
    }
    defaults = {
        "tie_word_embeddings": True,
        "activation_function": "gelu",
        "dropout": 0.1,
        "decoder_start_token_id": 2,
        "decoder_layers": 12,
        "decoder_attention_heads": 16,
        "decoder_ffn_dim": 4096,
    }
    fixed = {
        "norm": Norm.layer,
        "norm_eps": 1e-5,
        "norm_placement": Placement.post,
        "embedding_norm": True,
        "position": Position.learned,
        "position_offset": 2,
        "qkv_bias": True,
        "out_bias": True,
        "ff_bias": True,
        "gated": False,
        "head_bias": True,
    }
    activation_key = "activation_function"

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the decoder's depth and the scale of the embeddings."""
        for what in ("attention_heads", "ffn_dim"):
            sides = config[f"encoder_{what}"], config[f"decoder_{what}"]
            if sides[0] != sides[1]:
                raise CheckpointError(
                    f"config.json has encoder_{what}={sides[0]} and decoder_{what}={sides[1]}; only equal ones are "
                    "readable."
                )
        depth = config["decoder_layers"]
        return {
            "n_kv_heads": config["encoder_attention_heads"],
            "n_decoder_layers": None if depth == config["encoder_layers"] else depth,
            "embedding_scale": config["d_model"] ** 0.5 if config.get("scale_embedding") else 1.0,
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return the decoder's shape and the scale of the embeddings."""
        return {
            "decoder_layers": options.n_decoder_layers or options.n_layers,
            "decoder_attention_heads": options.n_heads,
            "decoder_ffn_dim": options.d_ff,
            "scale_embedding": options.embedding_scale != 1.0,
            "is_encoder_decoder": True,
        }

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""
        rules = [same("model.shared.weight", "embed.weight")]
        for side in ("encoder", "decoder"):
            depth = options.n_layers
            if side == "decoder":
                depth = options.n_decoder_layers or depth
            if options.position == Position.learned:
                rules.append(
                    same(f"model.{side}.embed_positions.weight", f"{side}.position_embed.weight")
                )
            for kind in ("weight", "bias"):
                if options.embedding_norm:
                    rules.append(
                        same(
                            f"model.{side}.layernorm_embedding.{kind}", f"{side}.embed_norm.{kind}"
                        )
                    )
                for i in range(depth):
                    rules += _block(side, i, kind)
        if head not in ("lm", "likelihood"):
            return rules + [same(theirs, ours) for theirs, ours in HEADS[head].items()]
        rules.append(Rule(("final_logits_bias",), ("head.bias",), _flat, _as_row))
        return rules if options.tie_embeddings else [*rules, same("lm_head.weight", "head.weight")]

    def ignored(self, name: str, options: Any) -> bool:
        """True for the copies of the embedding that old files hold."""
        copies = ["model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight"]
        return name in copies or (options.tie_embeddings and name == "lm_head.weight")


def _flat(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0][0]]


def _as_row(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors[0][None]]


def _block(side: str, i: int, kind: str) -> list[Rule]:
    theirs, ours = f"model.{side}.layers.{i}.", f"{side}.layers.{i}."
    parts = {"self_attn": "attention"}
    if side == "decoder":
        parts["encoder_attn"] = "cross_attention"
    rules = [
        same(f"{theirs}fc1.{kind}", f"{ours}feed_forward.up_proj.{kind}"),
        same(f"{theirs}fc2.{kind}", f"{ours}feed_forward.down_proj.{kind}"),
        same(f"{theirs}final_layer_norm.{kind}", f"{ours}feed_forward_norm.{kind}"),
    ]
    for there, here in parts.items():
        rules.append(same(f"{theirs}{there}_layer_norm.{kind}", f"{ours}{here}_norm.{kind}"))
        rules += [
            same(f"{theirs}{there}.{x}_proj.{kind}", f"{ours}{here}.{x}_proj.{kind}")
            for x in ("q", "k", "v", "out")
        ]
    return rules


FAMILY = Bart()
