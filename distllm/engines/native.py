"""What the engines have in common that run torch modules and torch optimizers directly: single, ddp, fsdp.

Each of them says in its own file how the model is wrapped and how gradients are brought together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distllm import registry
from distllm.engines import processes
from distllm.engines.base import Engine
from distllm.engines.hardware import resolve_device, resolve_precision
from distllm.engines.memory import prepare_blocks
from distllm.engines.mesh import ranks_of
from distllm.engines.options import BatchSizes, EngineOptions, HardwareOptions
from distllm.types import Batch, LossOutput, Objective, sum_by_key


class Caller(nn.Module):
    """The one module an engine wraps: its forward runs the model *and* what is made of its output.

    So whatever touches a parameter, a chunked loss that reads the head's weight among it, lies inside the forward
    around which a sharded engine gathers the weights.
    """

    def __init__(
        self, model: nn.Module, precision: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, function: Callable[..., Any], *args: Any) -> Any:
        """Return `function(model, *args)`, computed in the engine's precision."""
        with self.precision():
            return function(self.model, *args)


def losses_of(model: Any, objective: Objective, batch: Batch) -> tuple[dict[str, Tensor], Any]:
    """Run the objective; plain containers, in which a wrapper finds the tensors that carry gradient."""
    out = objective.loss(model, batch)
    return out.losses, out.metrics


class NativeEngine(Engine):
    """One model with a torch optimizer. Subclasses override `_wrap`, and what their wrapping changes."""

    Options: type = EngineOptions
    averages = False
    """Whether the wrapper divides gradients by the number of data-parallel ranks."""

    def __init__(
        self,
        role: str,
        model: nn.Module,
        *,
        options: EngineOptions,
        hardware: HardwareOptions,
        precision: str,
        batch: BatchSizes,
        optim: Any = None,
    ) -> None:
        self.role, self.options = role, options
        self.ranks = ranks_of(options)
        self.device = resolve_device(hardware.device, self.ranks.local_rank)
        self.dtype = resolve_precision(precision, self.device)
        self.optim, self.batch = optim, batch
        if optim is None:  # else the model says what is trained: beside an adapter most is not
            model.requires_grad_(False)
        self.model = self._place(model)
        self.caller: nn.Module = self._wrap(Caller(self.model, self._autocast))
        self.optimizer: Any = None if optim is None else self._make_optimizer()
        processes.renew_limit()

    def _place(self, model: nn.Module) -> nn.Module:
        """Put the model on the device and prepare its blocks."""
        model = model.to(self.device)
        prepare_blocks(model, self.options)
        return model

    def _wrap(self, caller: Caller) -> nn.Module:
        return caller

    def _make_optimizer(self) -> Any:
        return registry.get("optim", self.optim.name).build(self.model, self.optim)

    def _micro_step(self, is_last: bool) -> AbstractContextManager[Any]:
        """Surround one forward and backward; gradients need to be brought together in the last one alone."""
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        loss.backward()

    def _grad_norm(self, limit: float) -> Tensor:
        """Scale the gradient down to the norm `limit`; return its global norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit)

    def forward_backward(
        self, objective: Objective, micro_batches: Sequence[Batch], totals: Mapping[str, Tensor]
    ) -> LossOutput:
        self.model.train()
        # The law of the step is a sum over ranks: undo the mean that the wrapper takes.
        factor = self.ranks.dp_size if self.averages else 1
        scale = {
            k: factor * objective.coefficients[k] / t.to(self.device) for k, t in totals.items()
        }
        parts = []
        for index, batch in enumerate(micro_batches):
            with self._micro_step(is_last=index == len(micro_batches) - 1):
                losses, metrics = self.caller(losses_of, objective, batch.to(self.device))
                self._backward(torch.stack([scale[k] * x for k, x in losses.items()]).sum())
            parts.append(LossOutput({k: v.detach() for k, v in losses.items()}, metrics))
        losses = sum_by_key(p.losses for p in parts)
        sums = sum_by_key({k: v[0] for k, v in p.metrics.items()} for p in parts)
        weights = sum_by_key({k: v[1] for k, v in p.metrics.items()} for p in parts)
        return LossOutput(losses, {k: (sums[k], weights[k]) for k in sums})

    def update(self, lr: float) -> float | None:
        assert self.optimizer is not None, f"the {self.role} engine is frozen"
        norm = self._grad_norm(self.optim.max_grad_norm or float("inf"))
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
        self.model.eval()
        with torch.no_grad(), self._autocast():
            return function(self.model, *args)

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        self.model.eval()
        with torch.no_grad(), self._autocast():
            yield self.model

    def state(self, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self._kept(frozen):
            yield f"weight/{name}", self._full(parameter.detach())
            if self.optimizer is not None:
                for key, value in self.optimizer.state.get(parameter, {}).items():
                    yield f"{key}/{name}", self._full(value)
        for name, buffer in persistent_buffers(self.model).items():
            yield f"buffer/{name}", buffer

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        kinds: dict[str, list[str]] = {}
        for key in tensors:
            kind, name = key.split("/", 1)
            kinds.setdefault(name, []).append(kind)
        for name, parameter in self._kept():
            self._fill(parameter, tensors[f"weight/{name}"])
            moments = {k: tensors[f"{k}/{name}"] for k in kinds[name] if k != "weight"}
            if self.optimizer is not None and moments:
                self.optimizer.state[parameter] = {
                    k: v.clone() if k == "step" else self._like(parameter, v)
                    for k, v in moments.items()
                }
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(tensors[f"buffer/{name}"])

    def _kept(self, frozen: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters that a checkpoint holds: those that are trained; of a frozen model all."""
        for name, parameter in self.model.named_parameters():
            if frozen or self.optimizer is None or parameter.requires_grad:
                yield name, parameter

    def _full(self, tensor: Tensor) -> Tensor:
        """Return a tensor in full shape."""
        return tensor

    def _like(self, parameter: Tensor, full: Tensor) -> Tensor:
        """Return this rank's own copy of its part of `full`, laid out as `parameter`."""
        return full.to(parameter.device, copy=True)

    def _fill(self, parameter: Tensor, full: Tensor) -> None:
        parameter.copy_(full)

    def close(self) -> None:
        self.optimizer = None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers that are saved, by name."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {k: v for k, v in model.state_dict(keep_vars=True).items() if k not in parameters}
