"""The Engine protocol: one model under one way of running it. Nothing outside this folder branches on the kind.

An engine knows the Model and Objective protocols, never a concrete model. The model is touched only inside one
wrapped forward, so that sharded engines can gather and release parameters around it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distllm import registry
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.types import Batch, LossOutput, Objective, Ranks


class Engine(ABC):
    """One model (a *role*: policy, value, reference, reward) with its optimizer, if it is trained."""

    role: str
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    """Of the heavy arithmetic; weights and moments are fp32 (or fp64 where the model is)."""
    ranks: Ranks

    @abstractmethod
    def forward_backward(
        self, objective: Objective, micro_batches: Sequence[Batch], totals: Mapping[str, Tensor]
    ) -> LossOutput:
        """Add the gradient of sum_k coef_k * loss_k / totals_k over the micro-batches; return detached sums."""

    @abstractmethod
    def update(self, lr: float) -> float | None:
        """Clip and apply the gradient, then clear it; return its norm before clipping.

        A non-finite norm leaves the weights alone and returns None.
        """

    @abstractmethod
    def discard(self) -> None:
        """Clear the gradient without applying it."""

    @abstractmethod
    def infer(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(model, *args)` without gradient or dropout, in the engine's precision."""

    @abstractmethod
    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        """Yield the model ready for many forwards with unchanging weights."""

    @abstractmethod
    def all_sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum scalars over the data-parallel ranks. All ranks take part."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return everything that resumes: `weight/NAME`, `exp_avg/NAME`, ... in full shape."""

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` returned."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds (process groups, device memory)."""


def build_engine(
    role: str,
    model: nn.Module,
    *,
    options: EngineOptions,
    hardware: HardwareOptions,
    precision: str,
    optim: Any = None,
) -> Engine:
    """Put `model` under the engine that `options.name` names; without `optim` it is frozen."""
    engine = registry.get("engine", options.name)
    return engine(role, model, options=options, hardware=hardware, precision=precision, optim=optim)
