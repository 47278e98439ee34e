"""A whole copy of the model on every process (torch DistributedDataParallel).

Reference: Li et al. 2020, PyTorch Distributed, arXiv 2006.15704.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distllm.engines.native import Caller, NativeEngine
from distllm.engines.options import EngineOptions
from distllm.registry import register
from distllm.types import free


@dataclass(kw_only=True, slots=True)
class DDPOptions(EngineOptions):
    """Data parallel: each process needs memory for everything."""

    name: str = free("ddp")
    find_unused_parameters: bool = free(False)
    """Search each backward for parameters that got no gradient; needed only for models that leave some out, and slower."""
    bucket_mib: int = free(25)
    """Gradients are summed in buckets of this many MiB while the backward goes on; larger ones start later."""


@register("engine")
class DDP(NativeEngine):
    """Gradients are summed over all ranks during the last backward of a step."""

    Options = DDPOptions
    averages = True
    options: DDPOptions

    def _wrap(self, caller: Caller) -> nn.Module:
        if self.optim is None:
            return caller
        return DistributedDataParallel(
            caller,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            gradient_as_bucket_view=True,  # the gradients live in the buckets: no second copy
            find_unused_parameters=self.options.find_unused_parameters,
            bucket_cap_mb=self.options.bucket_mib,
        )

    def _micro_step(self, is_last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if is_last else self.caller.no_sync()  # type: ignore[operator]

    def close(self) -> None:
        super().close()
        if isinstance(self.caller, DistributedDataParallel):
            # The reducer owns the process group too. If it outlives the group's end it is the last owner, and then waits,
            # with the interpreter's lock, for a thread of the group that waits for that lock (seen with torch 2.13).
            for own in ("logger", "reducer"):
                setattr(self.caller, own, None)
