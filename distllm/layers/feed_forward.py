"""Feed-forward layers."""

import torch.nn.functional as F
from torch import Tensor, nn


class GatedFeedForward(nn.Module):
    """down(silu(gate(x)) * up(x)).

    Reference: Shazeer 2020, arXiv 2002.05202, equation 6 (SwiGLU), without biases.
    """

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=False)
        self.up_proj = nn.Linear(d_model, d_ff, bias=False)
        self.down_proj = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., d_model]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
