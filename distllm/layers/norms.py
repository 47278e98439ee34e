"""Normalisation layers."""

import torch
from torch import Tensor, nn

from distllm.layers.precision import compute_dtype, wide


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dim; the result has the dtype heavy work runs in.

    Reference: Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.
    """

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `x` [..., dim]."""
        precise = x.to(wide(x.dtype))
        scaled = precise * torch.rsqrt(precise.square().mean(dim=-1, keepdim=True) + self.eps)
        return (scaled * self.weight).to(compute_dtype(self.weight))
