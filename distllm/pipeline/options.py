"""Settings of a pipeline: which stages follow each other, and what each takes from an earlier one."""

from dataclasses import dataclass, field

from distllm.types import free


@dataclass(kw_only=True, slots=True)
class PipelineStage:
    """One stage of a pipeline."""

    name: str
    """Name of the stage and of its directory below `run.dir`."""
    kind: str = "train"
    """`train` runs a training stage; `collect` samples answers of the parent's model and writes preference pairs."""
    parent: str = ""
    """Stage whose model this one starts from; empty starts from random weights."""
    reward_model: str = ""
    """Stage whose model scores the responses (RL); empty uses the rule."""
    pairs: str = ""
    """`collect` stage whose preference pairs this one learns from (reward)."""
    overrides: list[str] = field(default_factory=list)
    """Settings of the stage, as on the command line of `distllm train`."""
    per_round: bool = False
    """Run once per round; from the second round on, `parent` is resolved within the round before."""


@dataclass(kw_only=True, slots=True)
class PipelineOptions:
    """A chain of stages."""

    name: str = "none"
    rounds: int = free(1)
    """How often the stages marked `per_round` are repeated, each round from the policy of the one before."""
    policy: str = ""
    """Stage whose model each further round starts from."""
    shared: list[str] = field(default_factory=list)
    """Settings of every stage; a stage's own come after them."""
    stages: list[PipelineStage] = field(default_factory=list)
    """The stages, in order."""
