"""Direct preference optimization: the policy's own log-ratios to a reference are the rewards.

    h = beta ((log pi(y_w|x) - log ref(y_w|x)) - (log pi(y_l|x) - log ref(y_l|x)))

    sigmoid  -p log sigmoid(h) - (1 - p) log sigmoid(-h)     p: probability that the label is right
    robust   (-(1 - e) log sigmoid(h) + e log sigmoid(-h)) / (1 - 2e)    e: label_smoothing
    hinge    max(0, 1 - h)
    ipo      (h / beta - 1 / (2 beta))^2

Reference: Rafailov et al. 2023, arXiv 2305.18290, equation 7. Label smoothing: Mitchell 2023 (cDPO).
robust: Chowdhury et al. 2024, arXiv 2403.00409. hinge: Zhao et al. 2023, arXiv 2305.10425.
ipo: Azar et al. 2023, arXiv 2310.12036, equation 17.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from distllm.objectives.preference import PairLoss, Sides, smoothed_log_sigmoid
from distllm.registry import register

LOSSES = ("sigmoid", "robust", "hinge", "ipo")
SMOOTHED = ("sigmoid", "robust")


@dataclass(kw_only=True, slots=True)
class DPOOptions:
    """Learn to prefer the better answer of each pair, near a reference."""

    name: str = "dpo"
    loss: str = "sigmoid"
    """`sigmoid`, `robust` (unbiased under label noise of rate `label_smoothing`), `hinge` or `ipo`."""
    beta: float = 0.1
    """Strength of the tie to the reference; larger stays nearer."""
    label_smoothing: float = 0.0
    """Share of labels that are taken to be wrong (sigmoid and robust), below 0.5."""
    reduction: str = "auto"
    """Log-probability of an answer: `sum` over its tokens or `mean`; `auto` is `mean` for ipo, whose authors
    average, and `sum` for the others."""
    sft_coef: float = 0.0
    """Weight of imitating the chosen answers besides (arXiv 2404.19733)."""
    reference: str = "auto"
    """Log-probabilities under the reference, the model that training starts from: `precompute` once for all data,
    `live` at each step (holds a second model; with an adapter, the trained one serves), or `auto`: whichever has fewer
    answers to score."""


@register("objective")
class DPO(PairLoss):
    """One loss per pair; weight: pairs."""

    Options = DPOOptions
    needs_reference = True

    def losses(self, sides: Sides) -> Tensor:
        """Return the loss of each pair, [pairs]."""
        options = self.options
        chosen, rejected = self._log_ratios(sides)
        logits = options.beta * (chosen - rejected)
        noise = options.label_smoothing
        match options.loss:
            case "sigmoid":
                right = sides.confidences * (1 - noise) + (1 - sides.confidences) * noise
                return -smoothed_log_sigmoid(logits, right)
            case "robust":
                clean, flipped = F.logsigmoid(logits), F.logsigmoid(-logits)
                return (-(1 - noise) * clean + noise * flipped) / (1 - 2 * noise)
            case "hinge":
                return F.relu(1 - logits)
            case "ipo":
                return (chosen - rejected - 1 / (2 * options.beta)) ** 2
        raise ValueError(f"loss {options.loss} is unknown")

    def rewards(self, sides: Sides) -> tuple[Tensor, Tensor]:
        """Return beta x log-ratio of either side."""
        chosen, rejected = self._log_ratios(sides)
        return self.options.beta * chosen, self.options.beta * rejected

    def _log_ratios(self, sides: Sides) -> tuple[Tensor, Tensor]:
        assert sides.ref_chosen is not None and sides.ref_rejected is not None
        chosen, rejected = sides.chosen - sides.ref_chosen, sides.rejected - sides.ref_rejected
        reduction = self.options.reduction
        if reduction == "mean" or (reduction == "auto" and self.options.loss == "ipo"):
            # An answer always has its end token, so no length is 0.
            return chosen / sides.chosen_lengths, rejected / sides.rejected_lengths
        return chosen, rejected
