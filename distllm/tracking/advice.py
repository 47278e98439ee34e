"""What a reader should know when a curve of RL crosses a threshold: one table of (condition, message).

A condition sees the values that were logged so far, nothing else. So the report replays the same table over
`metrics.jsonl` and shows the lines that the console printed, of runs that were interrupted or made elsewhere too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from distllm.tracking.lines import numbers

WINDOW = 3
"""Logged values that stand for "now", and, the first ones, for the start."""
REARM = 5
"""After this many logged rows below its threshold a rule may speak again."""


class History:
    """The logged values of every metric, in order."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, object]) -> None:
        """Append one logged row."""
        for name, value in numbers(metrics).items():
            self.values.setdefault(name, []).append(value)

    def now(self, name: str, window: int = WINDOW) -> float:
        """Return the mean of the last `window` values; NaN, which no threshold passes, while there are fewer."""
        return _mean(self.values.get(name, [])[-window:], window)

    def start(self, name: str) -> float:
        """Return the mean of the first values; NaN until the latest ones are others."""
        values = self.values.get(name, [])
        return _mean(values[:WINDOW], WINDOW) if len(values) >= 2 * WINDOW else math.nan

    def last(self, name: str) -> float:
        """Return the latest value; NaN if there is none."""
        return self.values.get(name, [math.nan])[-1]


Condition = Callable[[History], Sequence[float] | None]
"""None while all is well, else the numbers that the message names."""


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of the table."""

    name: str
    level: str
    """`note`: nothing is wrong, and it is said once a run. `warning`: look into it."""
    condition: Condition
    message: str


@dataclass(frozen=True, slots=True)
class Advice:
    """A rule's threshold was crossed at a step."""

    step: int
    name: str
    level: str
    text: str


@dataclass(slots=True)
class Advisor:
    """Watches a run; one per stage."""

    history: History = field(default_factory=History)
    _silence: dict[str, int] = field(default_factory=dict)
    """Rule that has spoken -> rows since it last held."""

    def look(self, step: int, metrics: Mapping[str, object]) -> list[Advice]:
        """Take in one logged row and return what is newly to be said."""
        self.history.add(metrics)
        said = []
        for rule in RULES:
            found = rule.condition(self.history)
            if found is not None:
                if rule.name not in self._silence:
                    said.append(Advice(step, rule.name, rule.level, rule.message.format(*found)))
                self._silence[rule.name] = 0
            elif rule.name in self._silence and rule.level != "note":
                self._silence[rule.name] += 1
                if self._silence[rule.name] >= REARM:
                    del self._silence[rule.name]
        return said


def above(name: str, limit: float, window: int = WINDOW) -> Condition:
    """Hold while the recent mean of a metric is at least `limit`; the message gets that mean."""

    def condition(history: History) -> Sequence[float] | None:
        value = history.now(name, window)
        return (value,) if value >= limit else None

    return condition


def below(name: str, limit: float, window: int = WINDOW) -> Condition:
    """Hold while the recent mean of a metric is under `limit`."""

    def condition(history: History) -> Sequence[float] | None:
        value = history.now(name, window)
        return (value,) if value < limit else None

    return condition


def first_inner_step(history: History) -> Sequence[float] | None:
    """Find a loss near 0 that comes from old and new policy being the same one."""
    loss, norm = history.last("train/loss"), history.last("train/grad_norm")
    same = abs(history.last("rl/ratio_mean") - 1) < 1e-4 and history.last("rl/clip_fraction") == 0
    return (loss, norm) if same and abs(loss) < 0.02 and norm > 0 else None


def negative_kl(history: History) -> Sequence[float] | None:
    """Find a mean log-ratio that is negative by more than sampling can explain.

    Its standard error follows from k2, half the mean square; tokens of one response go together, hence the wide bound.
    """
    value = history.now("rl/kl_k1", 5)
    tokens = 5 * history.now("rl/response_tokens", 5)
    error = math.sqrt(2 * max(history.now("rl/kl_k2", 5), 0.0) / tokens) if tokens > 0 else math.nan
    return (value, error) if value < -1e-3 and value < -6 * error else None


def reward_rose(history: History) -> bool:
    """Say whether the reward is clearly above where it began."""
    gain = history.now("rl/reward_mean") - history.start("rl/reward_mean")
    return gain > 0.25 * max(history.start("rl/reward_std"), 1e-9)


def longer_for_reward(history: History) -> Sequence[float] | None:
    """Find responses that grow together with their reward."""
    start, now = history.start("rl/response_length"), history.now("rl/response_length")
    return (start, now) if reward_rose(history) and now >= 1.5 * start else None


def collapsed_entropy(history: History) -> Sequence[float] | None:
    """Find an entropy that is a small rest of what it was."""
    start, now = history.start("rl/entropy"), history.now("rl/entropy")
    return (start, now) if now < 0.1 * start else None


def far_from_reference(history: History) -> Sequence[float] | None:
    """Find a divergence per token, while training or in the evaluations, that no small correction needs."""
    training = history.now("rl/kl_k1")
    held_out = history.last("eval/kl_ref") / max(history.last("eval/response_length"), 1.0)
    value = training if training >= 0.5 else held_out
    return (value,) if value >= 0.5 else None


def other_measure_fell(history: History) -> Sequence[float] | None:
    """Find a reward that rises while what it stands for falls."""
    values = history.values.get("eval/exact_match", [])
    if len(values) < 2 or not reward_rose(history) or values[-1] > values[0] - 0.05:
        return None
    return (history.start("rl/reward_mean"), history.now("rl/reward_mean"), values[0], values[-1])


def equal_rewards(history: History) -> Sequence[float] | None:
    """Find a reward function that says the same to every response."""
    same = history.now("rl/reward_std", 5) == 0 and history.now("rl/unscored", 5) < 1
    return (history.last("rl/reward_mean"),) if same else None


RULES = (
    Rule(
        "loss_near_zero", "note", first_inner_step,
        "loss near 0 on the first inner step is expected: it is {0:.1g}, the ratio of new to old policy is 1 and the "
        "advantages average out. The gradient does not (norm {1:.2g}): judge by rl/reward_mean.",
    ),
    Rule(
        "negative_kl", "warning", negative_kl,
        "KL negative: sampling and scoring distributions differ. The mean log-ratio to the reference is {0:.3f} nats a "
        "token, {1:.4f} being chance. Check that policy and reference share tokenizer, padding and temperature.",
    ),
    Rule(
        "no_spread", "warning", above("rl/zero_spread", 0.7),
        "{0:.0%} of groups have no spread: raise the temperature (generation.temperature) or filter prompts that are "
        "always or never answered right (stage=dapo resamples them).",
    ),
    Rule(
        "equal_rewards", "warning", equal_rewards,
        "every response of the last five logged steps has the reward {0:.3g}: nothing can be learned from it. Look at the "
        "responses in samples.jsonl, and at what the reward function wants of them.",
    ),
    Rule(
        "longer_for_reward", "warning", longer_for_reward,
        "responses grew from {0:.0f} to {1:.0f} tokens while the reward rose: a reward that pays for length is being used "
        "up. Read the samples; train the reward on pairs of equal length, or set stage.overlong_buffer.",
    ),
    Rule(
        "reward_is_length", "warning", above("rl/reward_length_correlation", 0.8),
        "reward and length of a response go together (correlation {0:.2f}): the reward hardly looks at anything else.",
    ),
    Rule(
        "entropy_collapse", "warning", collapsed_entropy,
        "entropy fell from {0:.2g} to {1:.2g} nats a token: the policy has settled on one answer and hardly tries another. "
        "If the samples are not what you want, lower optim.lr or set stage.entropy_coef=0.01.",
    ),
    Rule(
        "far_from_reference", "warning", far_from_reference,
        "the policy is {0:.2f} nats a token away from the reference: rewards earned so far out are often hacked. Read the "
        "samples; raise stage.kl_coef, or stop earlier.",
    ),
    Rule(
        "other_measure_fell", "warning", other_measure_fell,
        "the reward rose from {0:.3g} to {1:.3g} while held-out exact match fell from {2:.3f} to {3:.3f}: the reward no "
        "longer stands for what is wanted.",
    ),
    Rule(
        "truncated", "warning", above("rl/truncated", 0.5),
        "{0:.0%} of responses are cut by generation.max_new_tokens: raise it, or choose what they are worth with "
        "stage.truncated=penalise or mask.",
    ),
    Rule(
        "clipped", "warning", above("rl/clip_fraction", 0.3),
        "{0:.0%} of tokens are clipped: the updates go further than the clip allows. Lower optim.lr or stage.num_epochs.",
    ),
    Rule(
        "few_effective_samples", "warning", below("rl/effective_sample_size", 0.5),
        "the effective sample size is {0:.0%} of the tokens: a few dominate the update. Sample anew more often "
        "(stage.rollout_batch_size, stage.num_epochs) or lower optim.lr.",
    ),
    Rule(
        "sampler_mismatch", "warning", above("rl/sampler_kl", 1e-3),
        "sampler and trainer disagree about the sampled tokens (KL {0:.2g} nats a token, should be under 0.001): sample in "
        "the precision that is trained in, or set stage.off_policy=token_truncate.",
    ),
    Rule(
        "useless_values", "warning", below("rl/explained_variance", 0.0, 10),
        "the value model explains less than a constant would (explained variance {0:.2f}): raise stage.value_lr, or give "
        "it a head start with stage.value_warmup_steps.",
    ),
    Rule(
        "reward_errors", "warning", above("rl/reward_errors", 0.1),
        "{0:.0%} of responses got no reward because the reward function failed: the reasons are in the log, what it printed "
        "in logs/rewards.log.",
    ),
)  # fmt: skip
"""What is said, in the order in which it is looked at."""


def _mean(values: Sequence[float], wanted: int) -> float:
    return sum(values) / wanted if len(values) == wanted else math.nan
