"""Feed-forward layers. Mixtures of experts are in `experts.py`."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from distllm.layers.products import Linear


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _relu2,
}
"""Name -> function. `relu2`: So et al. 2021, Primer, arXiv 2109.08668."""


class GatedFeedForward(nn.Module):
    """down(activation(gate(x)) * up(x)).

    Reference: Shazeer 2020, arXiv 2002.05202, equation 6 (SwiGLU).
    """

    def __init__(
        self, d_model: int, d_ff: int, activation: str = "silu", bias: bool = False
    ) -> None:
        super().__init__()
        self.gate_proj = Linear(d_model, d_ff, bias=bias)
        self.up_proj = Linear(d_model, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., d_model]."""
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class FeedForward(nn.Module):
    """down(activation(up(x))).

    Reference: Vaswani et al. 2017, arXiv 1706.03762, equation 2.
    """

    def __init__(self, d_model: int, d_ff: int, activation: str, bias: bool = False) -> None:
        super().__init__()
        self.up_proj = Linear(d_model, d_ff, bias=bias)
        self.down_proj = Linear(d_ff, d_model, bias=bias)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        """Transform `x` [..., d_model]."""
        return self.down_proj(self.activation(self.up_proj(x)))
