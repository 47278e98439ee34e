"""RoBERTa: BERT whose positions start behind the padding id's, with other names around the head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.arch.hf.bert import KINDS, Bert
from distllm.arch.hf.rules import Rule, same


class Roberta(Bert):
    """RoBERTa in all sizes."""

    model_type = "roberta"
    base_prefix = "roberta."
    architectures = {
        h: c.replace("Bert", "Roberta") for h, c in Bert.architectures.items() if h != "value"
    } | {"value": "DistllmValueModel"}
    tiny = {
        **Bert.tiny,
        "max_position_embeddings": 66,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
    }
    constants = {**Bert.constants, "hidden_act": "gelu"}  # the head's is always this one

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return what BERT has, and the rows of the position table that no token uses."""
        offset = int(config.get("pad_token_id", 1)) + 1
        return super().read(config) | {
            "position_offset": offset,
            "max_seq_len": config["max_position_embeddings"] - offset,
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return what BERT has, and the padding id that positions are counted from."""
        return super().write(options) | {
            "pad_token_id": options.position_offset - 1,
            "max_position_embeddings": options.max_seq_len + options.position_offset,
        }

    def head_rules(self, options: Any, head: str) -> list[Rule]:
        """Return how the tensors of the head are translated."""
        names = dict(_HEADS[head])
        if head == "lm" and not options.tie_embeddings:
            names["lm_head.decoder.weight"] = "head.weight"
        return [same(theirs, ours) for theirs, ours in names.items()]

    def ignored(self, name: str, options: Any) -> bool:
        """True for tied copies, a pooler that the head has no use for, and counted positions."""
        copies = ("lm_head.decoder.bias",)
        if options.tie_embeddings:
            copies += ("lm_head.decoder.weight",)
        unused = name.startswith("roberta.pooler.")
        return name in copies or unused or name.endswith("embeddings.position_ids")


_VERDICT = {
    f"classifier.{theirs}.{kind}": f"head.{ours}{kind}"
    for theirs, ours in (("dense", "pooler."), ("out_proj", ""))
    for kind in KINDS
}
_HEADS = {
    "lm": {
        "lm_head.bias": "head.bias",
        **{
            f"lm_head.{theirs}.{kind}": f"head.transform.{ours}.{kind}"
            for theirs, ours in (("dense", "dense"), ("layer_norm", "norm"))
            for kind in KINDS
        },
    },
    "classify": _VERDICT,
    "last": _VERDICT,
    "tag": {f"classifier.{kind}": f"head.{kind}" for kind in KINDS},
    "none": {f"roberta.pooler.dense.{kind}": f"head.pooler.{kind}" for kind in KINDS},
    "value": {f"value.{kind}": f"head.{kind}" for kind in KINDS},
}

FAMILY = Roberta()
