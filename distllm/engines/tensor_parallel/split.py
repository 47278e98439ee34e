"""Tensor parallel: each rank of the tp axis holds a part of the matrices of a block and computes with that part.

Column-split layers give each rank its own heads or inner channels, row-split ones add the parts up. Between them, where
norms, dropout and residuals work token by token, each rank holds a part of the sequence (Korthikanti et al. 2022, arXiv
2205.05198). Outside the blocks every rank holds the whole sequence. What may be split is said by the model's
`shard_plan()`; the loss over a split vocabulary is in `vocabulary.py`.

Reference: Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053.
"""

from __future__ import annotations

import fnmatch
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from distllm.engines.exchange import Exchange
from distllm.engines.tensor_parallel import vocabulary
from distllm.errors import EngineError
from distllm.layers.products import linear

_log = logging.getLogger("distllm")

_PLACEMENT = {
    "column": Shard(0),
    "row": Shard(1),
    "vocab": Shard(0),
    "heads": Shard(1),
    "sequence": Replicate(),
    "whole": Replicate(),
}


def split_model(model: Any, mesh: DeviceMesh) -> None:
    """Split the parameters of `model` over `mesh`, which has the tp axis alone, and its forwards with them.

    Raises:
        EngineError: the plan does not say how a parameter of a block is split, or a size is no multiple of tp.
    """
    exchange = Exchange(mesh.get_group())
    kinds = {n: _kind(model.shard_plan(), n) for n, _ in model.named_parameters()}
    stacks = _stacks(model)
    homes: dict[str, dict[str, str]] = {}
    for name, kind in kinds.items():
        home, _, leaf = name.rpartition(".")
        in_block = any(name.startswith(f"{prefix}.") for prefix in stacks)
        if kind == "vocab" and model.get_parameter(name).shape[0] % mesh.size():
            _log.info("%s stays whole: tp_size=%d does not divide its rows.", name, mesh.size())
        elif in_block or kind in ("vocab", "heads"):
            _check(model, name, kind, mesh.size())
            homes.setdefault(home, {})[leaf] = kind or ""
    plan: dict[str, ParallelStyle] = {}
    for home, own in homes.items():
        plan[home] = _style(model.get_submodule(home), own, exchange)
    for prefix, blocks in stacks.items():
        _cut_sequence(prefix, blocks, kinds, model, exchange)
    parallelize_module(model, mesh, plan)
    vocabulary.enable(exchange)


def _kind(plan: Mapping[str, str], name: str) -> str | None:
    return next(
        (kind for pattern, kind in plan.items() if fnmatch.fnmatchcase(name, pattern)), None
    )


def _stacks(model: Any) -> dict[str, list[nn.Module]]:
    """Return the runs of blocks that follow each other, by the name they have in common."""
    names = {module: name for name, module in model.named_modules()}
    stacks: dict[str, list[nn.Module]] = {}
    for block in model.blocks():
        stacks.setdefault(names[block].rpartition(".")[0], []).append(block)
    return stacks


def _check(model: nn.Module, name: str, kind: str | None, tp_size: int) -> None:
    parameter = model.get_parameter(name)
    if kind not in _PLACEMENT:
        raise EngineError(
            f"engine.mesh.tp_size={tp_size}: the architecture's shard plan does not say how {name} is split "
            f"({kind}). Set engine.mesh.tp_size=1."
        )
    placement = _PLACEMENT[kind]
    if isinstance(placement, Shard) and parameter.shape[placement.dim] % tp_size:
        raise EngineError(
            f"engine.mesh.tp_size={tp_size} does not divide dim {placement.dim} of {name}, which has "
            f"{parameter.shape[placement.dim]}. Set a tp_size that does, or change the model's shape."
        )


def _style(module: nn.Module, kinds: Mapping[str, str], exchange: Exchange) -> ParallelStyle:
    if isinstance(module, nn.Embedding) and "vocab" in kinds.values():
        return _Local(kinds, lambda m: _embedding(m, exchange))
    if isinstance(module, nn.Linear) and kinds["weight"] == "row":
        return _Local(kinds, lambda m: _row_linear(m, exchange))
    if "vocab" in kinds.values():  # a head, whose loss asks for the matrix itself
        return _Split(kinds)
    return _Local(kinds, lambda m: m.forward)


class _Split(ParallelStyle):
    """Split a module's own parameters."""

    def __init__(self, kinds: Mapping[str, str]) -> None:
        self.kinds = kinds

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for leaf, kind in self.kinds.items():
            whole = module.get_parameter(leaf)
            split = distribute_tensor(
                whole.detach(), device_mesh, [_PLACEMENT[kind]], src_data_rank=None
            )
            parameter = nn.Parameter(split, requires_grad=whole.requires_grad)
            module.register_parameter(leaf, parameter)
        return module


class _Local(_Split):
    """Split a module's own parameters, and let its forward see this rank's parts as plain tensors."""

    def __init__(
        self, kinds: Mapping[str, str], make: Callable[[Any], Callable[..., Tensor]]
    ) -> None:
        super().__init__(kinds)
        self.make = make

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        super()._apply(module, device_mesh)
        forward = self.make(module)
        placements = {leaf: _PLACEMENT[kind] for leaf, kind in self.kinds.items()}
        # What is whole on every rank meets only this rank's tokens or heads: its gradient is a part of a sum.
        gradients = {
            leaf: placement if isinstance(placement, Shard) else Partial()
            for leaf, placement in placements.items()
        }

        def run(*args: Any, **kwargs: Any) -> Any:
            split = module._parameters
            module._parameters = {n: _local(p, gradients.get(n)) for n, p in split.items()}  # type: ignore[assignment]
            try:
                return forward(*args, **kwargs)
            finally:
                module._parameters = split

        module.forward = run
        return module


def _local(parameter: Tensor | None, gradient: Any) -> Tensor | None:
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.to_local(grad_placements=[gradient])


def _row_linear(module: nn.Linear, exchange: Exchange) -> Callable[..., Tensor]:
    """Each rank's product is a part of the sum; add up, and keep this rank's tokens."""

    def forward(x: Tensor) -> Tensor:
        out = exchange.reduce_to_sequence_part(linear(x, module.weight))
        return out if module.bias is None else out + module.bias

    return forward


def _embedding(module: nn.Embedding, exchange: Exchange) -> Callable[..., Tensor]:
    """Look up the ids that lie in this rank's part of the vocabulary; the others' rows come from the other ranks."""

    def forward(ids: Tensor) -> Tensor:
        weight = module.weight
        ids = ids - exchange.rank * weight.shape[0]
        elsewhere = (ids < 0) | (ids >= weight.shape[0])
        found = F.embedding(ids.masked_fill(elsewhere, 0), weight)
        return exchange.add_up(found.masked_fill(elsewhere[..., None], 0.0))

    return forward


def _cut_sequence(
    prefix: str,
    blocks: list[nn.Module],
    kinds: Mapping[str, str | None],
    model: nn.Module,
    exchange: Exchange,
) -> None:
    """Let the blocks of one stack pass on this rank's part of the sequence, and their split layers see all of it."""
    length = [0]

    def enter(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        length[0] = args[0].shape[1]
        return exchange.sequence_part(args[0]), *args[1:]

    def leave(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        return exchange.whole_sequence(out, length[0])

    blocks[0].register_forward_pre_hook(enter)
    blocks[-1].register_forward_hook(leave)

    parents: dict[str, list[nn.Module]] = {}
    for name, kind in kinds.items():
        layer = name.rpartition(".")[0]
        module = model.get_submodule(layer)
        if name.startswith(f"{prefix}.") and kind == "column" and isinstance(module, nn.Linear):
            columns = parents.setdefault(layer.rpartition(".")[0], [])
            if module not in columns:
                columns.append(module)
    for parent, columns in parents.items():
        _feed_columns(model.get_submodule(parent), columns, length, exchange)


def _feed_columns(
    parent: nn.Module, columns: list[nn.Module], length: list[int], exchange: Exchange
) -> None:
    """Give the column-split layers of `parent` the whole sequence, and add up what they send back."""
    known: dict[int, Tensor] = {}

    def gather(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = exchange.gather_sequence(args[0], length[0])
        known.clear()
        known[id(x)] = x
        return x, *args[1:]

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """What is not the gathered input (an encoder's states) is whole on every rank; its gradients must be added."""
        (x,) = args
        if id(x) not in known:
            known[id(x)] = exchange.add_up_gradients(x)
        return (known[id(x)],)

    def forget(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        known.clear()

    parent.register_forward_pre_hook(gather)
    # Also when recomputation breaks off a forward as soon as it has what it needs: a tensor kept here would keep the whole
    # recomputed block alive.
    parent.register_forward_hook(forget, always_call=True)
    for column in columns:
        column.register_forward_pre_hook(take)
