"""GPT-2: layer norms, learned positions, a plain feed-forward layer, biases everywhere.

Its linear layers are stored (in, out), and queries, keys and values are one matrix.
"""

from typing import Any

from distllm.arch.decoder import DecoderOptions
from distllm.arch.hf.causal import HEAD_TENSORS, classes
from distllm.arch.hf.family import Family
from distllm.arch.hf.rules import Rule, fused, same, transposed
from distllm.arch.options import Norm, Position


class GPT2(Family):
    """GPT-2 in all sizes."""

    model_type = "gpt2"
    arch = "decoder"
    options_class = DecoderOptions
    architectures = classes("GPT2", lm="GPT2LMHeadModel")
    tiny = {"vocab_size": 97, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 160}
    settings = {
        "vocab_size": "vocab_size",
        "n_embd": "d_model",
        "n_layer": "n_layers",
        "n_head": "n_heads",
        "n_positions": "max_seq_len",
        "n_inner": "d_ff",
        "layer_norm_epsilon": "norm_eps",
        "tie_word_embeddings": "tie_embeddings",
        "initializer_range": "init_std",
        "resid_pdrop": "dropout",
    }
    defaults = {
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "activation_function": "gelu_new",
        "resid_pdrop": 0.1,
    }
    constants = {
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "reorder_and_upcast_attn": False,
        "add_cross_attention": False,
    }
    fixed = {
        "norm": Norm.layer,
        "position": Position.learned,
        "gated": False,
        "qkv_bias": True,
        "out_bias": True,
        "ff_bias": True,
    }
    base_prefix = "transformer."
    activation_key = "activation_function"
    activation_names = {"gelu_tanh": "gelu_new"}

    def read(self, config: Any) -> dict[str, Any]:
        """Return the widths that are left out where they are the usual ones."""
        return {
            "n_kv_heads": config["n_head"],
            "d_ff": config.get("n_inner") or 4 * config["n_embd"],
        }

    def write(self, options: Any) -> dict[str, Any]:
        """Return dropouts that are ours or off."""
        return {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "summary_first_dropout": 0.0}

    def rules(self, options: Any, head: str) -> list[Rule]:
        """Return how each tensor is translated."""
        prefix = self.base_prefix
        rules = [
            same(f"{prefix}wte.weight", "embed.weight"),
            same(f"{prefix}wpe.weight", "position_embed.weight"),
        ]
        for kind in ("weight", "bias"):
            rules.append(same(f"{prefix}ln_f.{kind}", f"final_norm.{kind}"))
            matrix = transposed if kind == "weight" else same
            for i in range(options.n_layers):
                theirs, ours = f"{prefix}h.{i}.", f"layers.{i}."
                rules += [
                    same(f"{theirs}ln_1.{kind}", f"{ours}attention_norm.{kind}"),
                    same(f"{theirs}ln_2.{kind}", f"{ours}feed_forward_norm.{kind}"),
                    fused(
                        f"{theirs}attn.c_attn.{kind}",
                        [f"{ours}attention.{x}_proj.{kind}" for x in "qkv"],
                        turned=kind == "weight",
                    ),
                    matrix(f"{theirs}attn.c_proj.{kind}", f"{ours}attention.out_proj.{kind}"),
                    matrix(f"{theirs}mlp.c_fc.{kind}", f"{ours}feed_forward.up_proj.{kind}"),
                    matrix(f"{theirs}mlp.c_proj.{kind}", f"{ours}feed_forward.down_proj.{kind}"),
                ]
        if options.tie_embeddings and head in ("lm", "likelihood"):
            return rules
        names = HEAD_TENSORS[head]
        if head == "tag":
            names = {k.replace("score", "classifier"): v for k, v in names.items()}
        return rules + [same(theirs, ours) for theirs, ours in names.items()]

    def ignored(self, name: str, options: Any) -> bool:
        """True for the tied copy of the embedding, and for masks, which old files hold."""
        tied = options.tie_embeddings and name == "lm_head.weight"
        return tied or name.endswith(("attn.bias", "attn.masked_bias"))


FAMILY = GPT2()
