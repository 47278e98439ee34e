"""What is read from the hidden states: next-token distributions, a score per sequence, a value per position.

Heads that give a verdict or a label are in `verdict_heads.py`.

Heads hold the parameters, so a loss that needs them is asked of the head. The one way to use a head from an objective:
`hidden = model(..., compute_logits=False).last_hidden_state`, then `model.head.loss(hidden, labels)`,
`.logprobs(hidden, labels)`, `.values(hidden)` or, for both kinds of reward model, `.scores(hidden, batch)`.
With `compute_logits=True` the model itself fills `.logits`, `.values` or `.scores`, whichever the head can compute
without labels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from distllm.arch.options import TransformerOptions
from distllm.arch.pooling import Transform
from distllm.arch.verdict_heads import ClassifyHead, LastTokenHead, NoHead, Normalised, TagHead
from distllm.errors import ConfigError
from distllm.layers.chunked_logprobs import chunked_logprobs, chunked_normalisers
from distllm.layers.cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_z,
    linear_logprobs,
)
from distllm.layers.init import InitRules
from distllm.layers.liger_loss import CHUNKED
from distllm.layers.precision import wide
from distllm.layers.products import linear
from distllm.layers.sampled_softmax import sampled_cross_entropy
from distllm.layers.vocabulary import split_of, whole
from distllm.types import IGNORE_INDEX, Batch, ModelOutput


class LMHead(nn.Module):
    """Next-token distribution: hidden @ weight.T, where `weight` may be the embedding's.

    Switches of the options put a dense layer, activation and norm before the product, add a bias behind it, scale what
    goes in and squash what comes out.
    """

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        # In a tuple, so that the shared weight has one name only: the embedding's.
        self._tied_to = (tied_to,)
        self.softcap, self.scale = options.logit_softcap, options.logit_scale
        self.loss_kernel = CHUNKED
        self.transform = Transform(options) if options.head_transform else None
        if tied_to is None:
            self.weight = nn.Parameter(torch.empty(options.vocab_size, options.d_model))
        self.bias = nn.Parameter(torch.empty(options.vocab_size)) if options.head_bias else None

    def fix_bias(self) -> None:
        """Make the bias a number that is kept but not learned, 0 at the start, as BART's and Marian's is."""
        del self.bias
        zeros = self.projection.new_zeros(len(self.projection), device="cpu")
        self.register_buffer("bias", zeros)

    @property
    def projection(self) -> Tensor:
        """The output matrix [vocab, d_model]."""
        (embedding,) = self._tied_to
        return self.weight if embedding is None else embedding.weight

    @staticmethod
    def init_rules(d_model: int, init_std: float) -> InitRules:
        """Return the initialisation of this head's parameters."""
        return {"head.weight": ("normal", init_std)}

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> ModelOutput:
        """Fill `.logits`."""
        return ModelOutput(logits=self.logits(hidden))

    def logits(self, hidden: Tensor) -> Tensor:
        """Map [..., d_model] to [..., vocab]."""
        return self._project(self._prepare(hidden))

    def _prepare(self, hidden: Tensor) -> Tensor:
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return hidden if self.transform is None else self.transform(hidden)

    def _project(self, prepared: Tensor) -> Tensor:
        logits = self.multiply(prepared)
        if self.softcap is None:
            return logits
        return self.softcap * torch.tanh(logits / self.softcap)

    @property
    def is_plain(self) -> bool:
        """True where the logits are nothing but a matrix product, which the fused functions know."""
        return self.bias is None and self.softcap is None

    def multiply(self, prepared: Tensor) -> Tensor:
        """Apply the output matrix to [..., d_model]."""
        return linear(prepared, whole(self.projection), self.bias)

    def loss(self, hidden: Tensor, labels: Tensor, num_sampled: int = 0) -> Tensor:
        """Sum the cross-entropy over labelled positions.

        Args:
            hidden: [batch, seq, d_model].
            labels: [batch, seq]: the id position t must predict, IGNORE_INDEX where there is none.
            num_sampled: above 0: take the softmax over the labels and so many other words, see `sampled_softmax.py`.

        Returns:
            Scalar; 0 with a graph attached when nothing is labelled.

        Raises:
            ConfigError: part of the words is asked for, and the logits are more than a product with one whole matrix.
        """
        hidden, labels, _ = _labelled(hidden, labels)
        prepared = self._prepare(hidden)
        if num_sampled:
            if not self.is_plain or split_of(self.projection) is not None:
                raise ConfigError(
                    f"stage.sampled_words={num_sampled} needs an output matrix that lies whole on each process, without "
                    "bias or soft-cap behind it. Set stage.sampled_words=0."
                )
            return sampled_cross_entropy(prepared, self.projection, labels, num_sampled)
        if self.is_plain:
            return linear_cross_entropy(prepared, self.projection, labels, self.loss_kernel)
        return -chunked_logprobs(self._project, prepared, labels)[0].sum()

    def loss_z(self, hidden: Tensor, labels: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
        """Return (`loss` plus `z_loss` times the sum of the squared log normalisers, that sum alone)."""
        hidden, labels, _ = _labelled(hidden, labels)
        prepared = self._prepare(hidden)
        if self.is_plain:
            return linear_cross_entropy_z(
                prepared, self.projection, labels, z_loss, self.loss_kernel
            )
        squares = chunked_normalisers(self._project, prepared).square().sum()
        logprobs, _ = chunked_logprobs(self._project, prepared, labels)
        return z_loss * squares - logprobs.sum(), squares.detach()

    def logprobs(
        self, hidden: Tensor, labels: Tensor, temperature: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Log-probability of each label and entropy at its position, 0 where there is no label.

        Args:
            hidden: [batch, seq, d_model].
            labels: [batch, seq].
            temperature: divides the logits for both results.

        Returns:
            (logprobs, entropy), each [batch, seq].
        """
        hidden, targets, rows = _labelled(hidden, labels)
        prepared = self._prepare(hidden)
        if self.is_plain:
            found = linear_logprobs(prepared, self.projection, targets, temperature)
        else:
            found = chunked_logprobs(self._project, prepared, targets, temperature)
        logprobs, entropy = (
            x.new_zeros(labels.numel()).index_copy(0, rows, x).view(labels.shape) for x in found
        )
        return logprobs, entropy


class LikelihoodHead(LMHead, Normalised):
    """A reward model that is a language model: the score of a response is its summed log-probability."""

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__(options, tied_to)
        self._register_norm()

    def scores(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum the log-probabilities of `batch.labels` per row, at temperature 1: [batch]."""
        if batch.labels is None:
            raise ValueError("a likelihood head scores labelled responses; batch.labels is None")
        return self._normalise(self.logprobs(hidden, batch.labels)[0].sum(dim=1))


class ValueHead(nn.Module):
    """A value model's scalar at each position, 0 at the start."""

    def __init__(self, options: TransformerOptions, tied_to: nn.Embedding | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, options.d_model))
        self.bias = nn.Parameter(torch.empty(1))

    @staticmethod
    def init_rules(d_model: int, init_std: float) -> InitRules:
        """Return the initialisation of this head's parameters."""
        return {"head.*": ("constant", 0.0)}

    def forward(self, hidden: Tensor, attention_mask: Tensor | None) -> ModelOutput:
        """Fill `.values`."""
        return ModelOutput(values=self.values(hidden))

    def values(self, hidden: Tensor) -> Tensor:
        """Map [batch, seq, d_model] to [batch, seq], in float32 or wider."""
        return (hidden.to(wide(hidden.dtype)) * self.weight[0]).sum(dim=-1) + self.bias


def _labelled(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pick the positions that have a label.

    Args:
        hidden: [batch, seq, d_model].
        labels: [batch, seq].

    Returns:
        (hidden [tokens, d_model], labels [tokens], their places [tokens] in the flattened batch).
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    rows = (labels != IGNORE_INDEX).nonzero()[:, 0]
    if len(rows) == len(labels):
        return hidden, labels, rows
    return hidden.index_select(0, rows), labels.index_select(0, rows), rows


HEADS: dict[str, Any] = {
    "lm": LMHead,
    "last": LastTokenHead,
    "value": ValueHead,
    "likelihood": LikelihoodHead,
    "classify": ClassifyHead,
    "tag": TagHead,
    "none": NoHead,
}
