"""Decoder <-> Hugging Face's Llama family: names of settings and of tensors. Files are read and written by `arch/io.py`.

A model with a scalar score is a `LlamaForSequenceClassification` with one label. Two heads have no class in
transformers: a value model is `DistllmValueModel`, and a language model used as a judge is a plain causal model with
`distllm_head: likelihood` in its config.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from distllm.arch.decoder import DecoderOptions, resolve_d_head
from distllm.errors import CheckpointError

MODEL_TYPE = "llama"
ARCH = "decoder"

_ARCHITECTURES = {
    "lm": "LlamaForCausalLM",
    "likelihood": "LlamaForCausalLM",
    "last": "LlamaForSequenceClassification",
    "value": "DistllmValueModel",
}
_SETTINGS = {
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
"""Hugging Face's name -> ours."""

_WITHIN_BLOCK = {
    "input_layernorm.weight": "attention_norm.weight",
    "self_attn.q_proj.weight": "attention.q_proj.weight",
    "self_attn.k_proj.weight": "attention.k_proj.weight",
    "self_attn.v_proj.weight": "attention.v_proj.weight",
    "self_attn.o_proj.weight": "attention.out_proj.weight",
    "post_attention_layernorm.weight": "feed_forward_norm.weight",
    "mlp.gate_proj.weight": "feed_forward.gate_proj.weight",
    "mlp.up_proj.weight": "feed_forward.up_proj.weight",
    "mlp.down_proj.weight": "feed_forward.down_proj.weight",
}
_AROUND_BLOCKS = {
    "model.embed_tokens.weight": "embed.weight",
    "model.norm.weight": "final_norm.weight",
}
_HEADS = {
    "lm": {"lm_head.weight": "head.weight"},
    "likelihood": {"lm_head.weight": "head.weight"},
    "last": {"score.weight": "head.weight"},
    "value": {"value.weight": "head.weight", "value.bias": "head.bias"},
}
_NORM_BUFFERS = {"distllm_reward_mean": "head.reward_mean", "distllm_reward_std": "head.reward_std"}


def to_hf(
    options: DecoderOptions, state_dict: Mapping[str, Tensor], head: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Translate a decoder to (config.json, tensors) of the Llama family.

    Args:
        options: the decoder's shape.
        state_dict: our parameter names -> full tensors.
        head: "lm", "last", "value" or "likelihood".
    """
    config: dict[str, Any] = {"architectures": [_ARCHITECTURES[head]], "model_type": MODEL_TYPE}
    config |= {theirs: getattr(options, ours) for theirs, ours in _SETTINGS.items()}
    config |= {
        "head_dim": resolve_d_head(options),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "rope_theta": options.rope_theta,  # read by transformers before 5
        "rope_parameters": {"rope_type": "default", "rope_theta": options.rope_theta},
        "distllm_head": head,
        "dtype": str(state_dict["embed.weight"].dtype).removeprefix("torch."),
    }
    if head == "last":
        config |= {"num_labels": 1, "problem_type": "regression"}
    for key, name in _NORM_BUFFERS.items():
        if name in state_dict:
            config[key] = float(state_dict[name])
    names = _names(options, head)
    return config, {
        theirs: state_dict[ours] for theirs, ours in names.items() if ours in state_dict
    }


def from_hf(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> tuple[DecoderOptions, dict[str, Tensor], str]:
    """Translate (config.json, tensors) of the Llama family to (options, our state dict, head).

    Raises:
        CheckpointError: the config asks for something the decoder does not have.
    """
    _check_supported(config)
    given = {ours: config[theirs] for theirs, ours in _SETTINGS.items() if theirs in config}
    given.setdefault("n_kv_heads", given.get("n_heads"))
    rope = config.get("rope_parameters") or {}
    given["rope_theta"] = float(rope.get("rope_theta", config.get("rope_theta", 10000.0)))
    given.setdefault("norm_eps", 1e-6)
    given.setdefault("tie_embeddings", False)
    missing = [t for t, o in _SETTINGS.items() if o not in given and o not in _OPTIONAL]
    if missing:
        raise CheckpointError(f"config.json of a llama model lacks {', '.join(missing)}.")
    options = DecoderOptions(**given)
    head = _head_of(config)
    names = _names(options, head)
    tied_copy = {"lm_head.weight"} if options.tie_embeddings else set()
    unknown = {
        key
        for key in set(tensors) - set(names) - tied_copy
        if not key.endswith("rotary_emb.inv_freq")  # computed, not learned; old files hold it
    }
    state = {names[key]: value for key, value in tensors.items() if key in names}
    state |= {key: tensors[key] for key in sorted(unknown)}
    for key, name in _NORM_BUFFERS.items():
        if key in config:
            state[name] = torch.tensor(float(config[key]))
    return options, state, head


_OPTIONAL = {"d_head", "init_std", "dropout"}


def _names(options: DecoderOptions, head: str) -> dict[str, str]:
    """Map their tensor names to ours."""
    names = dict(_AROUND_BLOCKS)
    for layer in range(options.n_layers):
        for theirs, ours in _WITHIN_BLOCK.items():
            names[f"model.layers.{layer}.{theirs}"] = f"layers.{layer}.{ours}"
    tied = options.tie_embeddings and head in ("lm", "likelihood")
    return names if tied else names | _HEADS[head]


def _head_of(config: Mapping[str, Any]) -> str:
    head = config.get("distllm_head")
    if head is not None and head not in _HEADS:
        raise CheckpointError(
            f"config.json has distllm_head={head}; readable are {', '.join(sorted(_HEADS))}."
        )
    if head is not None:
        return head
    architecture = (config.get("architectures") or ["LlamaForCausalLM"])[0]
    for head, known in _ARCHITECTURES.items():
        if architecture == known:
            return head
    raise CheckpointError(
        f"config.json names the architecture {architecture}; readable are {', '.join(sorted(set(_ARCHITECTURES.values())))}."
    )


def _check_supported(config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    wanted = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
    }
    if "LlamaForSequenceClassification" in (config.get("architectures") or []):
        wanted["num_labels"] = (num_labels(config), 1)
    wrong = [
        f"{key}={got} (readable: {need})" for key, (got, need) in wanted.items() if got != need
    ]
    if wrong:
        raise CheckpointError(
            f"config.json asks for what the decoder does not have: {', '.join(wrong)}."
        )


def num_labels(config: Mapping[str, Any]) -> int:
    """Return how many outputs a classification head has (transformers writes the labels, not their number)."""
    if "num_labels" in config:
        return config["num_labels"]
    return len(config.get("id2label") or (0, 1))
