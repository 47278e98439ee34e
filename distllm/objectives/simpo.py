"""Simple preference optimization: the mean log-probability is the reward, and no reference is needed.

    loss = -log sigmoid(beta (mean log pi(y_w,t) - mean log pi(y_l,t)) - margin)

Reference: Meng et al. 2024, arXiv 2405.14734, equation 6 (its gamma is our margin).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from distllm.objectives.preference import PairLoss, Sides, smoothed_log_sigmoid
from distllm.registry import register


@dataclass(kw_only=True, slots=True)
class SimPOOptions:
    """Learn to make the better answer likelier per token than the worse one by a margin."""

    name: str = "simpo"
    beta: float = 2.0
    """Scale of the mean log-probabilities; larger separates the two answers more sharply."""
    margin: float = 1.0
    """By how much the chosen answer's reward is to lead (gamma in the paper)."""
    label_smoothing: float = 0.0
    """Share of labels that are taken to be wrong, below 0.5."""
    sft_coef: float = 0.0
    """Weight of imitating the chosen answers besides."""


@register("objective")
class SimPO(PairLoss):
    """One loss per pair; weight: pairs."""

    Options = SimPOOptions

    def losses(self, sides: Sides) -> Tensor:
        """Return the loss of each pair, [pairs]."""
        chosen, rejected = self.rewards(sides)
        noise = self.options.label_smoothing
        right = sides.confidences * (1 - noise) + (1 - sides.confidences) * noise
        return -smoothed_log_sigmoid(chosen - rejected - self.options.margin, right)

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Return beta x mean log-probability of either side."""
        beta = self.options.beta
        return (
            beta * sides.chosen / sides.chosen_lengths,
            beta * sides.rejected / sides.rejected_lengths,
        )
