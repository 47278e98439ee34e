"""What an algorithm says about itself: its equation, where each default comes from, who means something else by its name.

`distllm explain stage=NAME` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """An algorithm's card."""

    equation: str
    """In plain text, one line per equation."""
    paper: str
    """Authors, year, arXiv id."""
    expectation: str
    """What the gradient is on average, as the tests' enumeration of all responses finds it."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Option -> where its default comes from; only those whose reason differs from `SHARED_SOURCES`."""
    differences: Mapping[str, str] = field(default_factory=dict)
    """Framework -> what it does differently under the same name."""

    def source(self, option: str) -> str:
        """Return where the default of `option` comes from."""
        return self.sources.get(option) or SHARED_SOURCES.get(option, "")


OFF = "off: change one thing at a time"
SHARED_SOURCES: Mapping[str, str] = {
    "reward": "the rule, unless a reward model is given",
    "reward_model": "none, unless given",
    "reward_weights": "none: a reward model has one score, unless it has several objectives",
    "reward_label": "the last class: `positive` in most sentiment models",
    "reward_reads": "what a chat template or, without one, a continuation calls for",
    "reward_pattern": "none, unless given",
    "reward_url": "none, unless given",
    "reward_retries": "a server may restart",
    "reward_timeout_s": "long for a rule, short for a judge: set it",
    "reward_workers": "one per CPU core, at most 8",
    "num_samples": "TRL's GRPO: 8",
    "rollout_batch_size": "on policy: one update per batch of responses",
    "num_epochs": "verl, OpenRLHF, slime: 1",
    "clip_low": "0.2, as in OpenAI's code, TRL, verl and OpenRLHF",
    "clip_high": "0.2, as in OpenAI's code, TRL, verl and OpenRLHF",
    "dual_clip": "off, as in TRL; verl has 3 always on",
    "kl_coef": "off, as in TRL's GRPO, verl and DAPO",
    "environment": "none: a response is one turn",
    "max_turns": "a few calls of a tool, then an answer; read with an environment only",
    "measure_kl": "off: a reference costs the memory of a model",
    "kl_in": "a term of the loss, with the gradient of the true divergence (arXiv 2506.09477)",
    "kl_kind": "k1, the unbiased one",
    "target_kl": "fixed coefficient, as in TRL",
    "kl_horizon": "OpenAI's code: 10,000 responses",
    "entropy_coef": "off, as in TRL",
    "aggregation": "arXiv 2503.14476 and TRL, verl, OpenRLHF: every token counts the same",
    "truncated": "keep: nothing is changed unasked",
    "truncated_penalty": "one unit of a reward between 0 and 1",
    "overlong_buffer": OFF,
    "overlong_penalty": "arXiv 2503.14476: at most 1",
    "reward_clip": OFF,
    "reward_scale": OFF,
    "whiten_rewards": "off, as in verl",
    "off_policy": "none: the sampler is built in and shares the trainer's arithmetic",
    "off_policy_low": "IcePop: 0.5",
    "off_policy_high": "truncated importance sampling: 2",
    "pack": "padded rows, which every architecture reads",
}
"""Option of `RLOptions` -> where its default comes from."""
