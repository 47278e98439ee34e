"""Odds-ratio preference optimization: SFT on the chosen answers plus a penalty on the odds of the rejected.

    loss = -mean log pi(y_w,t) - odds_coef x log sigmoid(log odds(y_w) - log odds(y_l))
    odds(y) = p / (1 - p),  log p = mean over tokens of log pi(y_t | x, y_<t)

Reference: Hong et al. 2024, arXiv 2403.07691, equations 4 to 7.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from distllm.objectives.preference import PairLoss, Sides
from distllm.registry import register


@dataclass(kw_only=True, slots=True)
class ORPOOptions:
    """Learn to imitate the chosen answers and to make the rejected ones unlikely, without a reference."""

    name: str = "orpo"
    odds_coef: float = 0.1
    """Weight of the odds-ratio term beside the imitation of the chosen answers (lambda in the paper)."""
    sft_coef: float = 1.0
    """Weight of the imitation: 1 in the paper. It counts the answer's tokens, not the prompt's."""


@register("objective")
class ORPO(PairLoss):
    """Term `pairs`: odds ratio, weight pairs. Term `sft`: chosen answers, weight tokens."""

    Options = ORPOOptions

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Both terms, unless one is switched off."""
        terms = {"pairs": self.options.odds_coef, "sft": self.options.sft_coef}
        return {k: v for k, v in terms.items() if v or k == "pairs"}

    def losses(self, sides: Sides) -> Tensor:
        """Return -log sigmoid of the log odds ratio of each pair, [pairs]."""
        chosen, rejected = self.rewards(sides)
        odds = (chosen - rejected) - (_log_complement(chosen) - _log_complement(rejected))
        return -F.logsigmoid(odds)

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Return the mean log-probability of either side."""
        return sides.chosen / sides.chosen_lengths, sides.rejected / sides.rejected_lengths


def _log_complement(log_p: Tensor) -> Tensor:
    """Return log(1 - p) of log p < 0, exact near both ends.

    Reference: Maechler 2012, "Accurately computing log(1 - exp(-|a|))".
    """
    log_p = log_p.clamp(max=-1e-7)  # p = 1 would give odds without bound
    near_one = log_p > -0.6931
    # Either branch gets a harmless argument where the other is taken, so that no nan reaches its gradient.
    large = torch.log(-torch.expm1(torch.where(near_one, log_p, -1.0)))
    small = torch.log1p(-torch.exp(torch.where(near_one, -1.0, log_p)))
    return torch.where(near_one, large, small)
