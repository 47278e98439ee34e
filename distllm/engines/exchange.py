"""The steps by which the ranks of a tensor-parallel group pass activations on, each with the gradient that belongs to it.

Sequences are cut along dim 1 into equally long parts, the last ones padded with zeros.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 has renamed both.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Exchange:
    """The collectives of one group. All its ranks call each method, in the same order."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def sequence_part(self, x: Tensor) -> Tensor:
        """Keep this rank's part of `x`, which is the same on all ranks; gradients are brought together."""
        return _Cut.apply(x, self)

    def whole_sequence(self, part: Tensor, length: int) -> Tensor:
        """Bring the parts together; what follows is the same on all ranks, and so is its gradient."""
        return _Join.apply(part, length, False, self)

    def gather_sequence(self, part: Tensor, length: int) -> Tensor:
        """Bring the parts together; what follows differs from rank to rank, so gradients are added up."""
        return _Join.apply(part, length, True, self)

    def reduce_to_sequence_part(self, x: Tensor) -> Tensor:
        """Add up `x` over the ranks and keep this rank's part of the sequence."""
        return _Reduce.apply(x, self)

    def add_up(self, x: Tensor) -> Tensor:
        """Add up `x` over the ranks; what follows is the same on all, and so is its gradient."""
        return _AddUp.apply(x, self)

    def add_up_gradients(self, x: Tensor) -> Tensor:
        """Pass on `x`, which is the same on all ranks; what follows differs, so gradients are added up."""
        return _AddUpGradients.apply(x, self)

    def sum_(self, x: Tensor) -> Tensor:
        """Add up over the ranks in place, without gradient."""
        dist.all_reduce(x, group=self.group)
        return x

    def max_(self, x: Tensor) -> Tensor:
        """Take the maximum over the ranks in place, without gradient."""
        dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def _cut(self, x: Tensor) -> Tensor:
        part = -(-x.shape[1] // self.size)
        return self._padded(x).narrow(1, self.rank * part, part).contiguous()

    def _join(self, part: Tensor, length: int) -> Tensor:
        stacked = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        all_gather(stacked, part.contiguous(), group=self.group)
        whole = stacked.unflatten(0, (self.size, -1)).movedim(0, 1).flatten(1, 2)
        # Not a view: FSDP2 watches the tensors that leave a block.
        return whole if whole.shape[1] == length else whole[:, :length].contiguous()

    def _reduce(self, x: Tensor) -> Tensor:
        by_rank = self._padded(x).unflatten(1, (self.size, -1)).movedim(1, 0).contiguous()
        out = torch.empty_like(by_rank[0])
        reduce_scatter(out, by_rank.flatten(0, 1), group=self.group)
        return out

    def _padded(self, x: Tensor) -> Tensor:
        missing = -x.shape[1] % self.size
        return F.pad(x, (0, 0, 0, missing)) if missing else x


def gather_along(part: Tensor, dim: int, length: int, group: dist.ProcessGroup) -> Tensor:
    """Bring together what the ranks hold of dim `dim`, which has `length` in all and was cut as `Tensor.chunk` cuts."""
    size = dist.get_world_size(group)
    longest = -(-length // size)
    part = part.movedim(dim, 0)
    missing = longest - part.shape[0]
    if missing:
        part = torch.cat([part, part.new_zeros(missing, *part.shape[1:])])
    whole = part.new_empty(size * longest, *part.shape[1:])
    all_gather(whole, part.contiguous(), group=group)
    return whole[:length].movedim(0, dim)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.length, ctx.exchange = x.shape[1], exchange
        return exchange._cut(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._join(grad, ctx.length), None


class _Join(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, length: int, differs: bool, exchange: Exchange) -> Tensor:
        ctx.differs, ctx.exchange = differs, exchange
        return exchange._join(part, length)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        exchange = ctx.exchange
        return (exchange._reduce(grad) if ctx.differs else exchange._cut(grad)), None, None, None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.length, ctx.exchange = x.shape[1], exchange
        return exchange._reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange._join(grad, ctx.length), None


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        return exchange.sum_(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _AddUpGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.sum_(grad.clone(memory_format=torch.contiguous_format)), None
