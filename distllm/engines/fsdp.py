"""Weights, gradients and moments cut into shards (torch FSDP2), block by block; replicas of that, and tensor parallel.

A block's weights are gathered just before it runs and given back after. How matrix products are split over the tp axis
is in `tensor_parallel/`, how processes are laid out in `mesh.py`.

Reference: Zhao et al. 2023, PyTorch FSDP, arXiv 2304.11277; FSDP2 keeps each parameter as a DTensor of its own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm.engines.exchange import gather_along
from distllm.engines.memory import prepare_blocks
from distllm.engines.mesh import MeshOptions, build_mesh
from distllm.engines.native import Caller, NativeEngine
from distllm.engines.options import EngineOptions
from distllm.registry import register
from distllm.types import free

if (
    TYPE_CHECKING
):  # imported inside functions: half a second that every start of another engine would pay too
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor


@dataclass(kw_only=True, slots=True)
class FSDPOptions(EngineOptions):
    """Fully sharded: each process holds its part of everything."""

    name: str = free("fsdp")
    mesh: MeshOptions = free(default_factory=MeshOptions)
    """How processes are laid out."""
    reshard_after_forward: bool = free(True)
    """Give a block's gathered weights back after its forward and gather them again for the backward. False keeps
    them: faster, and the memory of all weights at once."""
    cpu_offload: bool = free(False)
    """Keep shards, gradients and moments in host memory, and update there; slower, and the GPU holds almost nothing."""
    no_sync: bool = free(False)
    """Bring gradients together once per step instead of once per micro-step: less to send, but every process then holds
    gradients of full size."""


@register("engine")
class FSDP(NativeEngine):
    """FSDP2 over the dp axes, tensor parallel over the tp axis."""

    Options = FSDPOptions
    builds_on_meta = True
    options: FSDPOptions

    def _place(self, model: nn.Module) -> nn.Module:
        self.mesh = build_mesh(self.options, self.device.type)
        self.dp_group = self.mesh["dp_replicate", "dp_shard"]._flatten("dp").get_group()
        self._initial: Callable[[str], Tensor] | None = vars(model).pop("initial_weights", None)
        self._plain = copy.deepcopy(model).to("meta")
        if self.ranks.tp_size > 1:
            from distllm.engines.tensor_parallel.split import split_model

            split_model(model, self.mesh["tp"])
        prepare_blocks(model, self.options)
        return model

    def _wrap(self, caller: Caller) -> nn.Module:
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            MixedPrecisionPolicy,
            OffloadPolicy,
            fully_shard,
        )

        if self.options.mesh.dp_replicate > 1:
            mesh = self.mesh["dp_replicate", "dp_shard"]
        else:
            mesh = self.mesh["dp_shard"]
        pinned = self.device.type == "cuda"
        offload = (
            CPUOffloadPolicy(pin_memory=pinned) if self.options.cpu_offload else OffloadPolicy()
        )
        reduced = torch.float32 if self.dtype == torch.bfloat16 else None
        # Blocks compute in bf16. What lies around them stays fp32 under autocast, so that the residual stream, the norms'
        # statistics and the logits have the precision they have on one process.
        blocks = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if self.dtype == torch.bfloat16 else None,
            reduce_dtype=reduced,
            cast_forward_inputs=False,
        )
        around = MixedPrecisionPolicy(reduce_dtype=reduced, cast_forward_inputs=False)
        shared: dict[str, Any] = {"mesh": mesh, "offload_policy": offload}
        for block in caller.model.blocks():  # type: ignore[operator]
            fully_shard(
                block,
                mp_policy=blocks,
                reshard_after_forward=self.options.reshard_after_forward,
                **shared,
            )
        fully_shard(caller, mp_policy=around, reshard_after_forward=False, **shared)
        for module in _sharded(caller):
            # The law of the step is a sum over ranks, not their mean.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            # Ranks may use different parameters (experts without a token): all take part all the same.
            module.set_reduce_scatter_unused_params(True)
        if self._initial is None:
            home = torch.device("cpu") if self.options.cpu_offload else self.device
            caller.to(home)
        else:
            self._materialise(caller.model, self._initial)
            self._initial = None
        return caller

    @torch.no_grad()
    def _materialise(self, model: nn.Module, initial: Callable[[str], Tensor]) -> None:
        """Give a model without memory its weights: each is drawn or read whole, and this rank keeps its part."""
        buffers = {
            name: buffer.detach().clone()
            for name, buffer in model.named_buffers()
            if not buffer.is_meta
        }
        model.to_empty(device="cpu" if self.options.cpu_offload else self.device)
        for name, parameter in model.named_parameters():
            self._fill(parameter, initial(name))
        saved = model.state_dict()
        for name, buffer in model.named_buffers():
            buffer.copy_(initial(name) if name in saved else buffers[name])

    def _micro_step(self, is_last: bool) -> AbstractContextManager[Any]:
        self.caller.set_requires_gradient_sync(is_last or not self.options.no_sync)  # type: ignore[operator]
        self.caller.set_is_last_backward(is_last)  # type: ignore[operator]
        return nullcontext()

    def _grad_norm(self, limit: float) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        parts = [_local(g) for g in gradients]
        squares: dict[tuple[str, ...], Tensor] = {}
        for gradient, norm in zip(gradients, torch._foreach_norm(parts), strict=True):  # pyright: ignore[reportPrivateImportUsage]
            axes = tuple(_dims(gradient))
            squares[axes] = squares.get(axes, 0.0) + norm.to(self.device).square()
        total = torch.stack([self._sum_over(axes, squares[axes]) for axes in sorted(squares)]).sum()
        norm = total.sqrt()
        if limit < float("inf"):
            factor = (limit / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(parts, factor.to(parts[0].device))  # pyright: ignore[reportPrivateImportUsage]
        return norm

    def _sum_over(self, axes: tuple[str, ...], value: Tensor) -> Tensor:
        """Add up over the mesh axes along which the tensors are cut; along the others all hold the same."""
        for axis in axes:
            dist.all_reduce(value, group=self.mesh[axis].get_group())
        return value

    def infer(self, function: Callable[..., Any], *args: Any) -> Any:
        self.caller.eval()
        with torch.no_grad(), self._autocast():
            result = self.caller(function, *args)
        # Without a backward nobody gives back what was gathered last: it would outlive the next update.
        for module in _sharded(self.caller):
            module.reshard()
        return result

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        """Gather every weight once, into a model without any wrapping; the forwards inside do not communicate."""
        modules = _sharded(self.caller)
        for module in modules:
            module.unshard()
        whole = {n: self._whole(p.detach()) for n, p in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())
        _assign(self._plain, whole, buffers)
        try:
            self._plain.eval()
            with torch.no_grad(), self._autocast():
                yield self._plain
        finally:
            _assign(self._plain, {n: p.to("meta") for n, p in whole.items()}, buffers)
            for module in modules:
                module.reshard()

    def _full(self, tensor: Tensor) -> Tensor:
        if not _is_cut(tensor):
            return tensor
        return self._whole(tensor.to(self.device) if self.options.cpu_offload else tensor)

    def _whole(self, tensor: Tensor) -> Tensor:
        """Undo `_part`: bring the shards together, then the parts of the tp axis. Their ranks take part."""
        if not _is_cut(tensor):
            return tensor
        dims = _dims(tensor)
        shape, whole = list(tensor.shape), tensor.to_local()
        if "tp" in dims:
            shape[dims["tp"]] //= self.mesh["tp"].size()
        if "dp_shard" in dims:
            group = self.mesh["dp_shard"].get_group()
            whole = gather_along(whole, dims["dp_shard"], shape[dims["dp_shard"]], group)
        if "tp" in dims:
            group = self.mesh["tp"].get_group()
            whole = gather_along(whole, dims["tp"], tensor.shape[dims["tp"]], group)
        return whole

    def _like(self, parameter: Tensor, full: Tensor) -> Tensor:
        if not _is_cut(parameter):
            return super()._like(parameter, full)
        from torch.distributed.tensor import DTensor

        local = self._part(parameter, full).to(parameter.device, copy=True)
        return DTensor.from_local(
            local,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )

    def _fill(self, parameter: Tensor, full: Tensor) -> None:
        if _is_cut(parameter):
            _local(parameter).copy_(self._part(parameter, full))
        else:
            parameter.copy_(full)

    def _part(self, parameter: DTensor, full: Tensor) -> Tensor:
        """Cut out this rank's part: first along tp, then, as FSDP2 does it, along dim 0 of what is left."""
        for axis in ("tp", "dp_shard"):
            dim = _dims(parameter).get(axis)
            if dim is not None:
                chunks = full.chunk(self.mesh[axis].size(), dim)
                rank = self.mesh[axis].get_local_rank()
                full = chunks[rank] if rank < len(chunks) else full.narrow(dim, 0, 0)
        return full


def _is_cut(tensor: Tensor) -> TypeGuard[DTensor]:
    """True for a tensor that is laid out over a mesh."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def _sharded(module: nn.Module) -> list[FSDPModule]:
    from torch.distributed.fsdp import FSDPModule

    return [m for m in module.modules() if isinstance(m, FSDPModule)]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_cut(tensor) else tensor


def _dims(tensor: Tensor) -> dict[str, int]:
    """Return mesh axis -> dim of `tensor` that is cut along it."""
    if not _is_cut(tensor):
        return {}
    names = tensor.device_mesh.mesh_dim_names or ()
    # torch's strided shards (FSDP2 over tensor parallel) are no `Shard`, but have its `dim`.
    dims = {
        name: getattr(placement, "dim", None)
        for name, placement in zip(names, tensor.placements, strict=True)
    }
    return {name: dim for name, dim in dims.items() if dim is not None}


def _assign(model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
    """Put tensors in the place of a model's parameters and buffers, by name, without copying."""
    for name, tensor in parameters.items():
        home, _, leaf = name.rpartition(".")
        model.get_submodule(home)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for name, tensor in buffers.items():
        home, _, leaf = name.rpartition(".")
        model.get_submodule(home)._buffers[leaf] = tensor
