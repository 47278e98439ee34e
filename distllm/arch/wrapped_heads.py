"""Language-model heads over the output matrix of a model of transformers, for `auto.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distllm.arch.heads import LikelihoodHead, LMHead
from distllm.arch.hf import wrapped
from distllm.layers.liger_loss import CHUNKED


class _WrappedMatrix:
    """Gives a language-model head the output matrix of a model of transformers instead of one of its own."""

    def _take(self: Any, model: Any) -> None:
        nn.Module.__init__(self)
        self.loss_kernel = CHUNKED
        self._matrix = (
            model.get_output_embeddings(),
        )  # in a tuple: its parameters are the model's
        self.softcap, self.scale, self.transform = wrapped.softcap_of(model.config), 1.0, None
        self.bias = None
        self._shift = (wrapped.shift_of(model),)

    @property
    def is_plain(self: Any) -> bool:
        bias = getattr(self._matrix[0], "bias", None)
        return bias is None and self.softcap is None and self._shift[0] is None

    @property
    def projection(self: Any) -> Tensor:
        """The output matrix [vocab, d_model]."""
        return self._matrix[0].weight

    def _project(self: Any, prepared: Tensor) -> Tensor:
        logits = wrapped.shifted(self._matrix[0](prepared), self._shift[0])
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class WrappedLMHead(_WrappedMatrix, LMHead):
    """The language-model head of a wrapped model."""

    def __init__(self, model: Any) -> None:
        self._take(model)


class WrappedLikelihoodHead(_WrappedMatrix, LikelihoodHead):
    """The same, judging by log-probabilities."""

    def __init__(self, model: Any) -> None:
        self._take(model)
        self._register_norm()
