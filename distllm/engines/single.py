"""One process on a CPU or one GPU: the reference that every other engine is held against."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from distllm import registry
from distllm.engines.base import Engine
from distllm.engines.hardware import resolve_device, resolve_precision
from distllm.engines.options import EngineOptions, HardwareOptions
from distllm.errors import ConfigError
from distllm.registry import register
from distllm.types import Batch, LossOutput, Objective, Ranks, sum_by_key


@register("engine")
class Single(Engine):
    """Engine without any communication."""

    Options = EngineOptions

    def __init__(
        self,
        role: str,
        model: nn.Module,
        *,
        options: EngineOptions,
        hardware: HardwareOptions,
        precision: str,
        optim: Any = None,
    ) -> None:
        self.role = role
        self.ranks = Ranks()
        self.device = resolve_device(hardware.device)
        self.dtype = resolve_precision(precision, self.device)
        self.model = model.to(self.device)
        self.model.requires_grad_(optim is not None)
        self.optim = optim
        self.optimizer: torch.optim.Optimizer | None = None
        if optim is not None:
            self.optimizer = registry.get("optim", optim.name).build(self.model, optim)
        _prepare_blocks(self.model, options)

    def forward_backward(
        self, objective: Objective, micro_batches: Sequence[Batch], totals: Mapping[str, Tensor]
    ) -> LossOutput:
        self.model.train()
        parts = []
        for batch in micro_batches:
            with self._autocast():
                out = objective.loss(self.model, batch.to(self.device))  # type: ignore[arg-type]
            scale = {k: objective.coefficients[k] / totals[k].to(self.device) for k in out.losses}
            torch.stack([scale[k] * loss for k, loss in out.losses.items()]).sum().backward()
            parts.append(LossOutput({k: v.detach() for k, v in out.losses.items()}, out.metrics))
        losses = sum_by_key(p.losses for p in parts)
        sums = sum_by_key({k: v[0] for k, v in p.metrics.items()} for p in parts)
        weights = sum_by_key({k: v[1] for k, v in p.metrics.items()} for p in parts)
        return LossOutput(losses, {k: (sums[k], weights[k]) for k in sums})

    def update(self, lr: float) -> float | None:
        assert self.optimizer is not None, f"the {self.role} engine is frozen"
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        limit = self.optim.max_grad_norm or float("inf")
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        if not torch.isfinite(norm):
            self.discard()
            return None
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def discard(self) -> None:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)

    def infer(self, function: Callable[..., Any], *args: Any) -> Any:
        with self.sampling() as model:
            return function(model, *args)

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            yield self.model

    def all_sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(values)

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.model.named_parameters():
            tensors[f"weight/{name}"] = parameter.detach()
            if self.optimizer is not None:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    tensors[f"{key}/{name}"] = value
        for name, buffer in _persistent_buffers(self.model).items():
            tensors[f"buffer/{name}"] = buffer
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            kind, name = key.split("/", 1)
            by_parameter.setdefault(name, {})[kind] = value
        for name, parameter in self.model.named_parameters():
            state = by_parameter.pop(name)
            parameter.copy_(state.pop("weight"))
            if self.optimizer is not None and state:
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else v.to(parameter.device, copy=True)
                    for k, v in state.items()
                }
        for name, buffer in _persistent_buffers(self.model).items():
            buffer.copy_(by_parameter.pop(name)["buffer"])

    def close(self) -> None:
        self.optimizer = None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if k not in parameters}


def _prepare_blocks(model: Any, options: EngineOptions) -> None:
    if options.activation_checkpointing not in ("none", "full"):
        raise ConfigError(
            f"engine.activation_checkpointing={options.activation_checkpointing} is unknown. "
            "Known: none, full."
        )
    for block in model.blocks():
        if options.activation_checkpointing == "full":
            block.forward = _recomputed(block.forward)
        if options.compile:
            block.compile()


def _recomputed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run
