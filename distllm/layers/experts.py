"""Mixture of experts: a router sends every token through a few of many feed-forward layers.

Dense feed-forward layers are in `feed_forward.py`. Losses that keep the router balanced are computed here, per sequence,
so that they do not depend on how a batch is split; objectives add them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from distllm.layers.feed_forward import ACTIVATIONS
from distllm.layers.precision import compute_dtype, wide
from distllm.layers.products import linear


class Router(nn.Module):
    """Scores every expert for every token and picks the best."""

    def __init__(
        self, d_model: int, num_experts: int, num_chosen: int, *, top_first: bool, renormalise: bool,
        bias: bool,
    ) -> None:  # fmt: skip
        """Build the router.

        Args:
            d_model: width of a token.
            num_experts: how many there are.
            num_chosen: how many each token goes through.
            top_first: softmax over the chosen only; else over all, before choosing.
            renormalise: make the chosen weights sum to 1, where the softmax was over all.
            bias: add a learned number per expert to the scores.
        """
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.num_chosen, self.top_first, self.renormalise = num_chosen, top_first, renormalise

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Route `x` [tokens, d_model].

        Returns:
            (scores [tokens, num_experts] in float32 or wider, weights and experts of the chosen [tokens, num_chosen]).
        """
        scores = linear(x, self.weight, self.bias)
        scores = scores.to(wide(scores.dtype))
        if self.top_first:
            top, chosen = scores.topk(self.num_chosen, dim=-1)
            return scores, torch.softmax(top, dim=-1), chosen
        weights, chosen = torch.softmax(scores, dim=-1).topk(self.num_chosen, dim=-1)
        if self.renormalise:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return scores, weights, chosen


class Experts(nn.Module):
    """Gated feed-forward layers beside each other, and the router before them.

    Reference: Shazeer et al. 2017, arXiv 1701.06538; Fedus et al. 2021, arXiv 2101.03961. Nothing is dropped: every
    expert takes all tokens that chose it.
    """

    def __init__(
        self,
        d_model: int,
        d_expert: int,
        num_experts: int,
        router: Router,
        *,
        activation: str,
        clamp: float | None = None,
        alpha: float = 1.702,
        bias: bool = False,
    ) -> None:
        """Build the layer.

        Args:
            d_model: width of a token.
            d_expert: inner width of one expert.
            num_experts: how many there are.
            router: picks them.
            activation: of the gate.
            clamp: GPT-OSS: gate up to this and up within it on both sides, then
                gate * sigmoid(alpha * gate) * (up + 1). None = activation(gate) * up.
            alpha: see `clamp`.
            bias: every expert has biases.
        """
        super().__init__()
        self.router = router
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, 2 * d_expert, d_model))
        self.down_proj = nn.Parameter(torch.empty(num_experts, d_model, d_expert))
        self.gate_up_bias = nn.Parameter(torch.empty(num_experts, 2 * d_expert)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(num_experts, d_model)) if bias else None
        self.activation, self.clamp, self.alpha = ACTIVATIONS[activation], clamp, alpha

    def forward(self, x: Tensor, real: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Transform `x` [batch, seq, d_model].

        Args:
            x: the tokens.
            real: [batch, seq] bool, False on padding, which counts in no loss.

        Returns:
            (out [batch, seq, d_model], {"balance", "router_z"}: sums over sequences).
        """
        batch, seq, d_model = x.shape
        tokens = x.reshape(-1, d_model)
        scores, weights, chosen = self.router(tokens)
        out = self._dispatch(tokens, weights, chosen).view(batch, seq, d_model)
        by_row = scores.view(batch, seq, -1), chosen.view(batch, seq, -1)
        if not self.training:
            return out, {}
        return out, {
            "balance": balance_loss(*by_row, real).sum(),
            "router_z": router_z_loss(by_row[0], real).sum(),
        }

    def _dispatch(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Sort (token, choice) pairs by expert, run each expert once, put the results back: [tokens, d_model]."""
        num_chosen = chosen.shape[1]
        order = chosen.flatten().argsort(stable=True)
        places = torch.empty_like(order).scatter_(
            0, order, torch.arange(len(order), device=order.device)
        )
        given = tokens.index_select(0, order // num_chosen)
        dtype = compute_dtype(self.gate_up_proj)
        if given.device.type == "cuda" and self._groups(dtype):
            made = self._grouped(given.to(dtype), chosen)
        else:
            made = self._one_by_one(given, _counts(chosen, len(self.gate_up_proj)))
        made = made.index_select(0, places).view(*chosen.shape, -1)
        return (made * weights.to(made.dtype)[..., None]).sum(dim=1)

    def _groups(self, dtype: torch.dtype) -> bool:
        """True where torch's grouped product takes these shapes: bfloat16, rows of a multiple of 16 bytes."""
        return dtype == torch.bfloat16 and not (
            self.down_proj.shape[1] % 8 or self.down_proj.shape[2] % 8
        )

    def _one_by_one(self, given: Tensor, counts: Sequence[int]) -> Tensor:
        parts = []
        for expert, part in enumerate(given.split(counts)):
            if not len(part):
                continue
            gate_up_bias = None if self.gate_up_bias is None else self.gate_up_bias[expert]
            down_bias = None if self.down_bias is None else self.down_bias[expert]
            inner = self._inner(linear(part, self.gate_up_proj[expert], gate_up_bias))
            parts.append(linear(inner, self.down_proj[expert], down_bias))
        return torch.cat(parts)

    def _grouped(self, given: Tensor, chosen: Tensor) -> Tensor:
        """All experts in two grouped matrix products; the host never waits for the counts."""
        num_experts, dtype = len(self.gate_up_proj), given.dtype
        sizes = torch.zeros(num_experts, dtype=torch.int64, device=given.device)
        sizes.scatter_add_(0, chosen.flatten(), torch.ones_like(chosen.flatten()))
        ends = sizes.cumsum(0).to(torch.int32)
        expert = torch.searchsorted(
            ends, torch.arange(len(given), device=given.device, dtype=torch.int32), right=True
        )
        inner = F.grouped_mm(given, self.gate_up_proj.to(dtype).transpose(1, 2), offs=ends)
        if self.gate_up_bias is not None:
            inner = inner + self.gate_up_bias.to(dtype)[expert]
        out = F.grouped_mm(self._inner(inner), self.down_proj.to(dtype).transpose(1, 2), offs=ends)
        return out if self.down_bias is None else out + self.down_bias.to(dtype)[expert]

    def _inner(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        if self.clamp is None:
            return self.activation(gate) * up
        gate, up = gate.clamp(max=self.clamp), up.clamp(-self.clamp, self.clamp)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


def balance_loss(scores: Tensor, chosen: Tensor, real: Tensor | None) -> Tensor:
    """Compute, for each sequence, num_experts * sum over experts of (share of choices) * (mean probability).

    With k choices per token the shares sum to k, as in transformers; a perfect balance gives k.

    Reference: Fedus et al. 2021, Switch Transformers, arXiv 2101.03961, equation 4. Departures: k choices; each sequence
    alone, so that the sum over a batch does not depend on its split.

    Args:
        scores: [batch, seq, num_experts], before any softmax.
        chosen: [batch, seq, k].
        real: [batch, seq] bool; None = all.

    Returns:
        [batch], 0 for a row without tokens.
    """
    num_experts = scores.shape[-1]
    probabilities = torch.softmax(scores, dim=-1)
    picked = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
    if real is None:
        return num_experts * (picked.mean(dim=1) * probabilities.mean(dim=1)).sum(dim=-1)
    keep = real[..., None]
    count = real.sum(dim=1, keepdim=True).clamp(min=1)
    shares = (picked * keep).sum(dim=1) / count
    return num_experts * (shares * ((probabilities * keep).sum(dim=1) / count)).sum(dim=-1)


def router_z_loss(scores: Tensor, real: Tensor | None) -> Tensor:
    """Compute, for each sequence, the mean over tokens of logsumexp(scores)^2: [batch].

    Reference: Zoph et al. 2022, ST-MoE, arXiv 2202.08906, equation 5.
    """
    squares = torch.logsumexp(scores, dim=-1).square()
    if real is None:
        return squares.mean(dim=1)
    return (squares * real).sum(dim=1) / real.sum(dim=1).clamp(min=1)


def pooled_balance_loss(scores: Sequence[Tensor], num_chosen: int, real: Tensor | None) -> Tensor:
    """Compute the balance loss of all layers and sequences in one pool, as transformers does.

    It depends on how a batch is split, so nothing trains on it; it is here for comparison.

    Args:
        scores: of every layer, [batch, seq, num_experts].
        num_chosen: k.
        real: [batch, seq] bool; None = all.
    """
    pool = torch.cat([s.flatten(0, 1) for s in scores])[None]
    keep = None if real is None else real.flatten().repeat(len(scores))[None]
    return balance_loss(pool, pool.topk(num_chosen, dim=-1).indices, keep)[0]


def _counts(chosen: Tensor, num_experts: int) -> list[int]:
    """Count the choices of every expert. Without values (memory estimates) they are taken as even."""
    if chosen.is_meta or isinstance(chosen, FakeTensor):
        even, rest = divmod(chosen.numel(), num_experts)
        return [even + (expert < rest) for expert in range(num_experts)]
    return torch.bincount(chosen.flatten(), minlength=num_experts).tolist()
