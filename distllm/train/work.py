"""What a training loop is handed: the work of one step, by a source that knows where in the data the run stands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from distllm.engines.base import Engine
from distllm.optim.constant import Constant
from distllm.train.ledger import Ledger
from distllm.types import Batch, Objective


@dataclass(slots=True)
class Work:
    """What one engine learns in one step."""

    engine: Engine
    objective: Objective
    micro_batches: Sequence[Batch]
    schedule: Constant
    lr: float
    """Peak learning rate; the schedule scales it."""
    derive: Callable[[Mapping[str, float]], dict[str, float]] = lambda metrics: {}
    """Metrics that follow from the means of the whole step, such as a ratio of two."""


class Source(Protocol):
    """Hands out the work of each step. In RL this is where responses are sampled and scored."""

    ledger: Ledger
    """Which samples have been handed out."""

    def next(self, step: int) -> tuple[list[Work], dict[str, float]] | None:
        """Return the work of 0-based `step` and metrics of how it was made; None when a stop came before it was ready."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what the source needs to go on: tensors, and the rest as JSON."""
        ...

    def load_state(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        ...

    def pass_over(self, state: dict[str, Any]) -> None:
        """Leave out what had been handed out when `state` was taken, later than the present one."""
        ...
