"""Group-relative policy optimization: each response is judged against the others to the same prompt.

    A = (r - mean of the group) / (std of the group + eps), the same for all tokens of a response

Reference: Shao et al. 2024, arXiv 2402.03300. Departures: token-mean aggregation and no KL term by default, as in
DAPO (arXiv 2503.14476); `stage.aggregation=sequence stage.kl_coef=0.04 stage.kl_kind=k3` is the paper's form. The KL
term has the gradient of the true divergence (arXiv 2506.09477), which the paper's k3 loss has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distllm.engines.base import Engine
from distllm.registry import register
from distllm.rl.advantages import group_advantages
from distllm.rl.algorithm import Algorithm, spread
from distllm.rl.card import Card
from distllm.rl.options import RLOptions
from distllm.types import Rollout


@dataclass(kw_only=True, slots=True)
class GRPOOptions(RLOptions):
    """GRPO: advantages from groups, no value model."""

    name: str = "grpo"
    kl_kind: str = "k3"
    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation; False is Dr. GRPO's choice (arXiv 2503.20783)."""
    advantage_eps: float = 1e-4
    """Added to that standard deviation."""


GROUP_SOURCES = {
    "kl_kind": "arXiv 2402.03300: k3",
    "scale_by_std": "arXiv 2402.03300: rewards are normalised by the group",
    "advantage_eps": "TRL: 1e-4; verl and NeMo: 1e-6; OpenRLHF: 1e-9",
}
"""Where the defaults of `GRPOOptions` come from, for every algorithm that builds on it."""


@register("algorithm")
class GRPO(Algorithm):
    """Policy only, judged within groups."""

    Options = GRPOOptions
    compares_group = True
    options: GRPOOptions
    card = Card(
        equation="""
A_i = (r_i - mean_j r_j) / (std_j r_j + advantage_eps), over the responses j to one prompt (divisor n - 1)
rho_t = exp(l_t - l_old_t)
loss = mean over tokens of max(-A_i rho_t, -A_i clip(rho_t, 1 - clip_low, 1 + clip_high)) + kl_coef KL_t
a group whose rewards are all equal has A = 0; a response without a reward is in neither mean nor std""",
        paper="Shao et al. 2024, arXiv 2402.03300",
        expectation="Biased: each group is divided by its own spread, and a token's share falls with the tokens of the "
        "batch. stage=dr_grpo has neither; stage=rloo is exact.",
        sources=GROUP_SOURCES,
        differences={
            "the paper": "mean over responses of each response's token mean (stage.aggregation=sequence), and a k3 KL "
            "loss of weight 0.04 whose gradient is not that of the divergence; ours is.",
            "TRL": "the same defaults (loss_type=dapo, epsilon 0.2, beta 0, std + 1e-4). Its KL loss multiplies k3 by "
            "the ratio (use_bias_correction_kl), which has the gradient of ours.",
            "verl": "a group of one keeps its raw reward as advantage; ours refuses num_samples=1. std + 1e-6.",
            "OpenRLHF": "clips rewards to +-10 after normalising; ours clips before (stage.reward_clip). std + 1e-9.",
            "NeMo": "subtracts the mean of the other responses (leave one out) and divides by the std all the same.",
        },
    )

    def set_advantages(
        self, rollouts: Sequence[Rollout], engines: Mapping[str, Engine]
    ) -> dict[str, float]:
        """Compare each response with its group."""
        advantages, zero_spread = group_advantages(
            self.response_rewards(rollouts), self.options.scale_by_std, self.options.advantage_eps
        )
        spread(advantages, rollouts)
        return {"rl/zero_spread": zero_spread}
