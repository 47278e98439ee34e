"""Adds the losses that a model with experts has of its own (`ModelOutput.aux`) to an objective's terms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distllm.types import Batch, LossOutput, Model, Objective


class WithExperts:
    """An objective plus the balance of the router. Everything else is the inner objective's.

    Both terms are taken per row and weigh as many as there are rows, so they do not depend on how a batch is split.
    Their coefficients are `arch.balance_coef` and `arch.router_z_coef`.
    """

    def __init__(self, inner: Objective, options: Any) -> None:
        self.inner = inner
        coefficients = {"balance": options.balance_coef, "router_z": options.router_z_coef}
        self.terms = [term for term, value in coefficients.items() if value]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Return the inner terms', and 1 for each own term: the model has applied its coefficient."""
        return {**self.inner.coefficients, **dict.fromkeys(self.terms, 1.0)}

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Pad `examples` to one rectangle."""
        return self.inner.collate(examples)

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Return the inner terms' weights, and the number of rows."""
        rows = torch.tensor(float(len(batch.input_ids)), dtype=torch.float64)
        rows = rows.to(batch.input_ids.device)
        return {**self.inner.weights(batch), **dict.fromkeys(self.terms, rows)}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Run the inner objective, which passes on what the model says of itself."""
        return self.inner.loss(model, batch)


def with_experts(objective: Any, options: Any) -> Any:
    """Wrap `objective` where a model of these options has experts whose balance counts."""
    has_experts = getattr(options, "num_experts", 0) > 0
    wrapped = WithExperts(objective, options) if has_experts else objective
    return wrapped if has_experts and wrapped.terms else objective
