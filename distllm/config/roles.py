"""Which models a stage holds."""

from dataclasses import dataclass

from distllm.config.schema import Config, supervised_stages


@dataclass(frozen=True, slots=True)
class Role:
    """One model that a stage holds."""

    name: str
    head: str
    is_trained: bool


def roles_of(config: Config) -> list[Role]:
    """List the models that the stage holds; the first is the one it is about."""
    stage = config.stage
    has_adapter = config.adapter.name != "none"  # switched off it is the reference
    if stage.name in supervised_stages():
        roles = [Role("model", getattr(stage, "head", "lm"), True)]
        if getattr(stage, "reference", "") in ("auto", "live") and not has_adapter:
            roles.append(Role("reference", "lm", False))
        return roles
    roles = [Role("policy", "lm", True)]
    if hasattr(stage, "value_lr"):
        roles.append(Role("value", "value", True))
    if (stage.kl_coef > 0 or stage.target_kl > 0) and not has_adapter:
        roles.append(Role("reference", "lm", False))
    if stage.reward == "model" or (stage.reward == "auto" and stage.reward_model):
        roles.append(Role("reward", "likelihood", False))
    return roles
