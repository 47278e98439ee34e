"""What must hold for a stage that learns from preferences: values by themselves, and against each other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distllm.config.rules import NOT_NEGATIVE, POSITIVE, Rule, by_key, one_of
from distllm.objectives.dpo import LOSSES, SMOOTHED

if TYPE_CHECKING:
    from distllm.config.schema import Config

_RULES: dict[Rule, str] = {
    POSITIVE: "stage.beta stage.desirable_weight stage.undesirable_weight",
    NOT_NEGATIVE: "stage.center_coef stage.sft_coef stage.odds_coef stage.margin",
    Rule(lambda v: 0 <= v < 0.5, "must be from 0 to below 0.5"): "stage.label_smoothing",
    one_of(*LOSSES): "stage.loss",
    one_of("auto", "sum", "mean"): "stage.reduction",
    one_of("auto", "precompute", "live"): "stage.reference",
}


def preference_rules() -> dict[str, Rule]:
    """Return dotted key -> what its value must fulfil."""
    return by_key(_RULES)


def preference_problems(config: Config) -> list[str]:
    """Check the settings of a preference stage against each other."""
    stage = config.stage
    if stage.name == "dpo" and stage.label_smoothing and stage.loss not in SMOOTHED:
        return [
            f"stage.label_smoothing={stage.label_smoothing} has no meaning with stage.loss={stage.loss}. "
            f"Set stage.label_smoothing=0, or stage.loss to {' or '.join(SMOOTHED)}."
        ]
    if stage.name == "orpo" and not stage.odds_coef and not stage.sft_coef:
        return ["stage.odds_coef=0 and stage.sft_coef=0 leave nothing to learn. Set one above 0."]
    return []
