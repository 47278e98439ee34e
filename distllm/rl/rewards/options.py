"""Settings of what scores responses, shared by every RL algorithm."""

from dataclasses import dataclass, field


@dataclass(kw_only=True, slots=True)
class RewardingOptions:
    """Which reward functions, and what they need."""

    reward: str = "auto"
    """What scores a response: `exact_match` (the prompt's answer), `regex` (what `reward_pattern` finds, against the
    answer), `format` (whether `reward_pattern` is found at all), `math_verify` (mathematical equality with the answer),
    `MODULE:FUNCTION` (any Python function), `http` (`reward_url`), `model` (a reward model on the sampled ids),
    `classifier` (a sequence classifier with its own tokenizer, on the text), or `auto`: `model` if `reward_model` is
    set, else `exact_match`. Several with weights: `math_verify + 0.2*my_rewards:brevity`."""
    reward_model: str = ""
    """Directory of the reward model or classifier."""
    reward_weights: dict[str, float] = field(default_factory=dict)
    """`model`, trained with `stage=multi_reward`: what each objective's score counts, as in {helpful: 1, harmless: 0.5}."""
    reward_label: str = ""
    """Class whose probability is the classifier's reward, by name or number; empty takes the score of a model with
    one output, or the last class."""
    reward_reads: str = "auto"
    """What the classifier reads: the `response` alone, prompt and response `joined` to one text, as a `pair`, or as a
    `dialogue` in its chat template; `auto` is `dialogue` where it has a template, else `joined`."""
    reward_pattern: str = ""
    """Regular expression of `regex` and `format`. `regex` compares its first group, or all of it; the last match counts."""
    reward_url: str = ""
    """Address of `http`: it gets prompt, response, answer as JSON and answers {"reward": NUMBER}."""
    reward_retries: int = 2
    """Further attempts of `http` after a failure."""
    reward_timeout_s: float = 10.0
    """Seconds that a reward function may take for one response (`http`: per attempt); then the response is left out."""
    reward_workers: int = 0
    """Processes that run reward functions; 0 takes one per CPU core, at most 8."""
