"""Heads that judge: a label or a score per sequence, a label per token. Where a sequence is read is in `pooling.py`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distllm.arch.options import Pooler, TransformerOptions
from distllm.arch.pooling import Pooled, Transform
from distllm.layers.init import InitRules
from distllm.layers.precision import wide
from distllm.layers.products import Linear, linear
from distllm.types import IGNORE_INDEX, Batch, ModelOutput


class Normalised(nn.Module):
    """Scores reported as (score - reward_mean) / reward_std; 0 and 1 until set."""

    reward_mean: Tensor
    reward_std: Tensor

    def _register_norm(self) -> None:
        self.register_buffer("reward_mean", torch.tensor(0.0, device="cpu"))
        self.register_buffer("reward_std", torch.tensor(1.0, device="cpu"))

    def _normalise(self, scores: Tensor) -> Tensor:
        return (scores - self.reward_mean) / self.reward_std


class LastTokenHead(Pooled, Normalised):
    """A reward model's scalar per row, read where `arch.pooling` says: at the last real token of a decoder."""

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__(options)
        self.weight = nn.Parameter(torch.empty(1, options.d_model))
        has_bias = options.pooler != Pooler.none
        self.bias = nn.Parameter(torch.empty(1)) if has_bias else None
        self._register_norm()

    @staticmethod
    def init_rules(d_model: int, init_std: float) -> InitRules:
        """Return the initialisation of this head's parameters: N(0, 1 / (d_model + 1)).

        Reference: Stiennon et al. 2020, arXiv 2009.01325, appendix B.1.
        """
        return {"head.weight": ("normal", (d_model + 1) ** -0.5)}

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> ModelOutput:
        """Fill `.scores`."""
        return ModelOutput(scores=self._score(hidden, attention_mask))

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Score each row of `hidden` [batch, seq, d_model], whose real tokens `batch.output_mask` marks: [batch]."""
        if batch.segment_ids is not None:
            raise ValueError("a score per row needs one sequence per row; segment_ids mark packing")
        return self._score(hidden, batch.output_mask)

    def _score(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        pooled = self.pool(hidden, attention_mask)
        # One scalar per row costs nothing, so it is computed outside autocast, in full precision.
        scores = (pooled.to(wide(pooled.dtype)) * self.weight).sum(dim=-1)
        return self._normalise(scores if self.bias is None else scores + self.bias)


class ClassifyHead(Pooled):
    """A label per sequence, read where `arch.pooling` says."""

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__(options)
        self.weight = nn.Parameter(torch.empty(options.num_labels, options.d_model))
        has_bias = options.pooler != Pooler.none
        self.bias = nn.Parameter(torch.empty(options.num_labels)) if has_bias else None

    @staticmethod
    def init_rules(d_model: int, init_std: float) -> InitRules:
        """Return the initialisation of this head's parameters."""
        return {"head.weight": ("normal", init_std)}

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> ModelOutput:
        """Fill `.logits` [batch, num_labels]."""
        return ModelOutput(logits=self.logits(hidden, attention_mask))

    def logits(self, hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Map [batch, seq, d_model] to [batch, num_labels]; `attention_mask` is True on real tokens."""
        return linear(self.pool(hidden, attention_mask), self.weight, self.bias)

    def logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each row's label and entropy, where `labels` [batch, seq] holds it, 0 elsewhere.

        The label must stand at the position that the verdict is read from: that is where its state is.
        """
        at = labels != IGNORE_INDEX
        logits = linear(self.behind(hidden[at]), self.weight, self.bias)
        scores = torch.log_softmax(logits.to(wide(logits.dtype)) / temperature, dim=-1)
        picked = scores.gather(1, labels[at][:, None])[:, 0]
        entropy = -(scores.exp() * scores).sum(dim=-1)
        zeros = scores.new_zeros(labels.shape)
        return zeros.masked_scatter(at, picked), zeros.masked_scatter(at, entropy)


class TagHead(nn.Module):
    """A label per token."""

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        self.dropout = options.dropout
        self.transform = Transform(options) if options.pooler == Pooler.transform else None
        self.weight = nn.Parameter(torch.empty(options.num_labels, options.d_model))
        self.bias = nn.Parameter(torch.empty(options.num_labels))

    @staticmethod
    def init_rules(d_model: int, init_std: float) -> InitRules:
        """Return the initialisation of this head's parameters."""
        return {"head.weight": ("normal", init_std)}

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> ModelOutput:
        """Fill `.logits` [batch, seq, num_labels]."""
        return ModelOutput(logits=self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map [..., d_model] to [..., num_labels]."""
        if self.transform is not None:
            hidden = self.transform(hidden)
        if self.dropout:
            hidden = F.dropout(hidden, self.dropout, self.training)
        return linear(hidden, self.weight, self.bias)


class NoHead(nn.Module):
    """Hidden states are all that is wanted. BERT's dense layer on the first token is kept for who saves it again."""

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        if options.pooler == Pooler.tanh:
            self.pooler = Linear(options.d_model, options.d_model)

    @staticmethod
    def init_rules(d_model: int, init_std: float) -> InitRules:
        """Return nothing: what there is starts as everything else."""
        return {}

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> ModelOutput:
        """Fill nothing."""
        return ModelOutput()
