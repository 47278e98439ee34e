"""Sequence classifiers: ours where we have the architecture, else as transformers runs them (frozen, whole)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from distllm.arch.hf.family import families
from distllm.arch.io import read_config, read_tokenizer
from distllm.types import ModelOutput


class ForeignClassifier(nn.Module):
    """A classifier of an architecture that we do not have."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        limit = getattr(model.config, "max_position_embeddings", None) or 512
        self.options = SimpleNamespace(max_seq_len=limit)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, compute_logits: bool = True, **rest: Any
    ) -> ModelOutput:
        """Fill `.logits` [batch, labels]."""
        return ModelOutput(logits=self.model(input_ids, attention_mask.long(), **rest).logits)

    def blocks(self) -> list[nn.Module]:
        """Nothing inside is known to us."""
        return []


def load_classifier(folder: str | Path, load: Callable[[str], Any]) -> tuple[Any, Any, list[str]]:
    """Read a sequence classifier, its tokenizer, and the names of its classes; nothing is fetched from a network.

    Args:
        folder: the directory.
        load: reads a model of ours from a directory.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    folder = Path(folder)
    config = read_config(folder)
    names = [str(n) for _, n in sorted(config.get("id2label", {}).items(), key=lambda x: int(x[0]))]
    if config.get("model_type") in families():
        model, tokenizer = load(str(folder)), read_tokenizer(folder)
        outputs = getattr(model.options, "num_labels", 1) if model.head_name == "classify" else 1
    else:
        from transformers import AutoModelForSequenceClassification

        loaded = AutoModelForSequenceClassification.from_pretrained(folder, local_files_only=True)
        model, tokenizer = ForeignClassifier(loaded), read_tokenizer(folder)
        outputs = loaded.config.num_labels
    return model, tokenizer, (names or [str(i) for i in range(outputs)])[:outputs]
