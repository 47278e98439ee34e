"""Marian translation models: BART's blocks with fixed sinusoidal positions and embeddings that are not normalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distllm.arch.hf.bart import Bart
from distllm.arch.hf.t5 import classes
from distllm.arch.options import Position
from distllm.errors import CheckpointError


class Marian(Bart):
    """The Helsinki-NLP models; source and target share one vocabulary."""

    model_type = "marian"
    architectures = classes("Marian", "MarianMTModel")
    tiny = {
        **Bart.tiny,
        "activation_function": "swish",
        "pad_token_id": 96,
        "decoder_start_token_id": 96,
        "eos_token_id": 0,
        "forced_eos_token_id": 0,
    }
    defaults = {**Bart.defaults, "decoder_start_token_id": 58100}
    constants = {"share_encoder_decoder_embeddings": True}
    fixed = {
        **Bart.fixed,
        "embedding_norm": False,
        "position": Position.sinusoidal,
        "position_offset": 0,
    }
    activation_names = {"silu": "swish"}

    def read(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Refuse two vocabularies; the rest is BART's."""
        own = config.get("decoder_vocab_size")
        if own not in (None, config["vocab_size"]):
            raise CheckpointError(
                f"config.json has decoder_vocab_size={own} and vocab_size={config['vocab_size']}; only one vocabulary "
                "is readable."
            )
        return super().read(config)

    def write(self, options: Any) -> dict[str, Any]:
        """Write the one vocabulary twice."""
        return {**super().write(options), "decoder_vocab_size": options.vocab_size}

    def ignored(self, name: str, options: Any) -> bool:
        """True for copies of the embedding, and for computed positions, which old files hold."""
        return super().ignored(name, options) or name.endswith("embed_positions.weight")


FAMILY = Marian()
