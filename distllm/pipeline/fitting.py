"""Where tokenizer and model must know of each other: special tokens for an architecture, their ids in its options."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from distllm.config.schema import Config
from distllm.data.fim import FIM_TOKENS
from distllm.data.vocabulary import DOCUMENT_MASK, SPECIAL_TOKENS, START_OF_PIECE

_IDS = {"blank_id": DOCUMENT_MASK, "start_id": START_OF_PIECE}
"""Option of an architecture -> the token whose id it takes while it is None."""


def special_tokens(config: Config) -> tuple[str, ...]:
    """Return what a tokenizer that is trained for this run must hold beside text."""
    gaps = FIM_TOKENS if getattr(config.stage, "fim_rate", 0) else ()
    return (*gaps, *SPECIAL_TOKENS.get(config.arch.name, ()))


def fit_options(options: Any, tokenizer: Any) -> Any:
    """Return the options with the ids that they take from the tokenizer."""
    known = tokenizer.get_vocab()
    open_ids = {
        name: known[token]
        for name, token in _IDS.items()
        if getattr(options, name, 0) is None and token in known
    }
    return replace(options, **open_ids) if open_ids else options


def set_dropout(model: Any, value: float, *, keep_others: bool) -> None:
    """Set the dropout of the blocks; without `keep_others` turn all further kinds off too."""
    for block in model.blocks():
        if isinstance(getattr(block, "dropout", None), float):
            block.dropout = value
    if keep_others:
        return
    for module in model.modules():
        for name in ("dropout", "dropout_weights", "dropout_embedding"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
