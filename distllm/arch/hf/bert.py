"""BERT: post-norm, learned positions, two token types, a dense layer before the output matrix, a pooled first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from distllm.arch.encoder import EncoderOptions
from distllm.arch.hf.family import Family
from distllm.arch.hf.rules import Rule, same
from distllm.errors import CheckpointError

KINDS = ("weight", "bias")


class Bert(Family):
    """BERT in all sizes, MiniLM and other models with its layout."""

    model_type = "bert"
    arch = "encoder"
    options_class = EncoderOptions
    base_prefix = "bert."
    architectures = {
        "lm": "BertForMaskedLM",
        "classify": "BertForSequenceClassification",
        "last": "BertForSequenceClassification",
        "tag": "BertForTokenClassification",
        "none": "BertModel",
        "value": "DistllmValueModel",
    }
    tiny = {
        "vocab_size": 97,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 64,
    }
    settings = {
        "vocab_size": "vocab_size",
        "hidden_size": "d_model",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "intermediate_size": "d_ff",
        "max_position_embeddings": "max_seq_len",
        "type_vocab_size": "token_types",
        "layer_norm_eps": "norm_eps",
        "initializer_range": "init_std",
        "hidden_dropout_prob": "dropout",
        "tie_word_embeddings": "tie_embeddings",
    }
    defaults = {
        "layer_norm_eps": 1e-12,
        "type_vocab_size": 2,
        "hidden_dropout_prob": 0.1,
        "tie_word_embeddings": True,
    }
    constants = {"is_decoder": False, "add_cross_attention": False}

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the number of key/value heads: that of all heads."""
        kind = config.get("position_embedding_type", "absolute")
        if kind != "absolute":
            raise CheckpointError(
                f"config.json has position_embedding_type={kind}; readable is absolute."
            )
        return {"n_kv_heads": config["num_attention_heads"]}

    def write(self, options: Any) -> dict[str, Any]:
        """Return a dropout that we do not have."""
        return {"attention_probs_dropout_prob": 0.0}

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""
        base = self.base_prefix
        rules = [
            same(f"{base}embeddings.word_embeddings.weight", "embed.weight"),
            same(f"{base}embeddings.position_embeddings.weight", "position_embed.weight"),
            same(f"{base}embeddings.token_type_embeddings.weight", "token_type_embed.weight"),
        ]
        for kind in KINDS:
            rules.append(same(f"{base}embeddings.LayerNorm.{kind}", f"embed_norm.{kind}"))
            for i in range(options.n_layers):
                theirs, ours = f"{base}encoder.layer.{i}.", f"layers.{i}."
                pairs = {
                    "attention.self.query": "attention.q_proj",
                    "attention.self.key": "attention.k_proj",
                    "attention.self.value": "attention.v_proj",
                    "attention.output.dense": "attention.out_proj",
                    "attention.output.LayerNorm": "attention_norm",
                    "intermediate.dense": "feed_forward.up_proj",
                    "output.dense": "feed_forward.down_proj",
                    "output.LayerNorm": "feed_forward_norm",
                }
                rules += [
                    same(f"{theirs}{t}.{kind}", f"{ours}{o}.{kind}") for t, o in pairs.items()
                ]
        return rules + self.head_rules(options, head)

    def head_rules(self, options: Any, head: str) -> list[Rule]:
        """Return how the tensors of the head are translated."""
        names = dict(_HEADS[head])
        if head == "lm" and not options.tie_embeddings:
            names["cls.predictions.decoder.weight"] = "head.weight"
        return [same(theirs, ours) for theirs, ours in names.items()]

    def renamed(self, tensors: Mapping[str, Tensor], known: set[str]) -> Mapping[str, Tensor]:
        """Read gains and shifts under the names that the first files gave them, and add a missing prefix."""
        spelled = {
            n.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): t
            for n, t in tensors.items()
        }  # fmt: skip
        return super().renamed(spelled, known)

    def ignored(self, name: str, options: Any) -> bool:
        """True for tied copies, the next-sentence head, a pooler that the head has no use for, and counted positions."""
        copies = ("cls.predictions.decoder.bias",)
        if options.tie_embeddings:
            copies += ("cls.predictions.decoder.weight",)
        return (
            name in copies
            or name.startswith(("cls.seq_relationship.", "bert.pooler."))
            or name.endswith("embeddings.position_ids")
        )


_POOLER = {f"bert.pooler.dense.{kind}": f"head.pooler.{kind}" for kind in KINDS}
_CLASSIFIER = {f"classifier.{kind}": f"head.{kind}" for kind in KINDS}
_HEADS = {
    "lm": {
        "cls.predictions.bias": "head.bias",
        **{
            f"cls.predictions.transform.{theirs}.{kind}": f"head.transform.{ours}.{kind}"
            for theirs, ours in (("dense", "dense"), ("LayerNorm", "norm"))
            for kind in KINDS
        },
    },
    "classify": _POOLER | _CLASSIFIER,
    "last": _POOLER | _CLASSIFIER,
    "tag": _CLASSIFIER,
    "none": _POOLER,
    "value": {f"value.{kind}": f"head.{kind}" for kind in KINDS},
}

FAMILY = Bert()
