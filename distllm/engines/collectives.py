"""What the ranks tell each other beside gradients: scalars, small tensors, JSON, and whether all of them are well.

Every function here is a collective: all ranks of the group must call it, in the same order. With one process, or none
started, each returns at once. Messages travel as safetensors and JSON, never as pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeVar

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from distllm.errors import OtherRankError, UserError

T = TypeVar("T")
Group = Any
"""A torch process group; None is all ranks."""


def world_size(group: Group = None) -> int:
    """Return the number of ranks in `group`."""
    return dist.get_world_size(group) if dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """Return this process's number in `group`."""
    return dist.get_rank(group) if dist.is_initialized() else 0


def barrier() -> None:
    """Wait until all ranks are here."""
    any_true(False)


def any_true(flag: bool) -> bool:
    """True on all ranks if it is on one."""
    if world_size() == 1:
        return flag
    box = torch.tensor([int(flag)])
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box.item())


def sum_scalars(values: Mapping[str, Tensor], group: Group = None) -> dict[str, Tensor]:
    """Add up scalars over the ranks of `group` in float64, on the CPU. All must pass the same keys."""
    if world_size(group) == 1 or not values:
        return dict(values)
    flat = torch.stack([v.detach().double().cpu() for v in values.values()])
    dist.all_reduce(flat, group=group)
    return dict(zip(values, flat, strict=True))


def gather_tensors(tensors: Mapping[str, Tensor], group: Group = None) -> list[dict[str, Tensor]]:
    """Return what each rank of `group` passed, in order; names, shapes and dtypes may differ. On the CPU.

    Names come sorted: safetensors gives them in an order of its own in each process, and whoever divides the tensors
    among the ranks needs one order on all.
    """
    if world_size(group) == 1:
        return [dict(sorted(tensors.items()))]
    owned = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    parts = [safetensors.torch.load(data) for data in _gather(safetensors.torch.save(owned), group)]
    return [dict(sorted(part.items())) for part in parts]


def gather_json(value: Any, group: Group = None) -> list[Any]:
    """Return what each rank of `group` passed, in order."""
    if world_size(group) == 1:
        return [value]
    return [json.loads(data) for data in _gather(json.dumps(value).encode(), group)]


def on_main(work: Callable[[], Any]) -> None:
    """Call `work` on rank 0 while the others wait; an error there is raised on all."""
    together(lambda: work() if rank() == 0 else None)


def from_main(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and give its result, which JSON must keep, to all. An error there is raised on all."""
    found = together(lambda: make() if rank() == 0 else None)
    return gather_json(found)[0]


def together(work: Callable[[], T]) -> T:
    """Call `work`, which must not communicate, on every rank; an error on one is raised on all, so that none waits.

    Raises:
        OtherRankError: `work` succeeded here and failed elsewhere. The rank where it failed raises its own error.
    """
    error = result = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    _share(error)
    return result  # type: ignore[return-value]


@contextmanager
def main_holds(context: Callable[[], AbstractContextManager[Any]]) -> Iterator[None]:
    """Enter `context()` on rank 0 alone; all ranks go on when it holds, or raise its error."""
    held = context() if rank() == 0 else None
    together(lambda: held.__enter__() if held else None)
    if held is None:
        yield
        return
    try:
        yield
    except BaseException as error:
        if not held.__exit__(type(error), error, error.__traceback__):
            raise
    else:
        held.__exit__(None, None, None)


def _share(error: Exception | None) -> None:
    if world_size() == 1:
        if error is not None:
            raise error
        return
    if any_true(error is not None):
        found = gather_json(
            None
            if error is None
            else [type(error).__name__, str(error), isinstance(error, UserError)]
        )
        if error is not None:
            raise error
        first = next(i for i, message in enumerate(found) if message is not None)
        raise OtherRankError(first, *found[first])


def _gather(data: bytes, group: Group) -> list[bytes]:
    size = world_size(group)
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(size)]
    dist.all_gather(lengths, torch.tensor([len(data)]), group=group)
    longest = max(int(n) for n in lengths)
    padded = torch.zeros(longest, dtype=torch.uint8)
    padded[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    boxes = [torch.zeros(longest, dtype=torch.uint8) for _ in range(size)]
    dist.all_gather(boxes, padded, group=group)
    return [box[: int(n)].numpy().tobytes() for box, n in zip(boxes, lengths, strict=True)]
