"""AdamW with decay on matrices only."""

import torch
from torch import nn

from distllm.optim.options import AdamWOptions
from distllm.registry import register


@register("optim")
class AdamW:
    """AdamW (arXiv 1711.05101), one fused kernel over all parameters."""

    Options = AdamWOptions

    @staticmethod
    def build(model: nn.Module, options: AdamWOptions) -> torch.optim.Optimizer:
        """Build the optimizer; parameters of two and more dims are decayed, gains and biases are not."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {
                "params": [p for p in parameters if p.ndim >= 2],
                "weight_decay": options.weight_decay,
            },
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=options.lr,
            betas=(options.beta1, options.beta2),
            eps=options.eps,
            fused=True,
        )
