"""What an architecture can be trained for. Stages read it from the class; nothing else tells them one from another."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Abilities:
    """The defaults are those of a causal language model."""

    objectives: tuple[str, ...] = ("clm",)
    """Pretraining objectives it can learn; the first is its own (`stage.objective=auto`)."""
    sft: str = "sft"
    """Objective that imitates dialogues; empty = there is none."""
    generates: bool = True
    """Says text token by token; if not, its policy in RL draws a label."""
    packs: bool = False
    """Several sequences may share a row (`segment_ids`), and that pays: attention is told by segments, without a detour."""
    two_sequences: bool = False
    """Reads a source and writes a target; if not, both are one sequence, and states stand at the input's tokens."""
    traceable: bool = True
    """A block is operations that torch.compile and selective recomputation can follow."""


CAUSAL = Abilities()
"""Of architectures that do not say otherwise."""
