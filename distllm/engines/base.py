"""The Engine protocol: one model under one way of running it. Nothing outside this folder branches on the kind.

An engine knows the Model and Objective protocols, never a concrete model. The model is touched only inside one
wrapped forward, so that sharded engines can gather and release parameters around it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from distllm import registry
from distllm.engines import collectives, processes
from distllm.engines.attention import set_attention, set_loss_kernel
from distllm.engines.mesh import shape_of
from distllm.engines.options import BatchSizes, EngineOptions, HardwareOptions
from distllm.layers.attention_kernels import Choice
from distllm.types import Batch, LossOutput, Objective, Ranks


class Engine(ABC):
    """One model (a *role*: policy, value, reference, reward) with its optimizer, if it is trained."""

    role: str
    model: nn.Module
    device: torch.device
    dtype: torch.dtype
    """Of the heavy arithmetic; weights and moments are fp32 (or fp64 where the model is)."""
    ranks: Ranks
    attention: Choice | None = None
    """The kernel that the model got; None = it has no attention of ours."""
    dp_group: Any = None
    """Process group of the ranks that see different data and otherwise hold the same; None is all ranks."""
    needs_group = True
    """Whether the library wants a process group even for one process."""
    builds_on_meta = False
    """Whether the model may come without memory, with `model.initial_weights`: parameter or buffer name -> full value."""

    @classmethod
    def problems(
        cls,
        options: Any,
        *,
        hardware: HardwareOptions,
        precision: str,
        optim: Any,
        batch: BatchSizes,
    ) -> list[str]:
        """Say what keeps this engine from running as asked on this machine; called before anything is built."""
        return []

    @classmethod
    def choose(cls, options: Any) -> Any:
        """Return the options to run with: a file that they name may ask for those of another engine."""
        return options

    @property
    def num_parameters(self) -> int:
        """Number of weights of the whole model, those that are held in fewer bits among them."""
        return sum(getattr(p, "num_weights", p.numel()) for p in self.model.parameters())

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
        """Call `function(model, *args)` without gradient or dropout, in the engine's precision.

        All ranks must call equally often: a sharded model gathers its weights block by block. `share` cuts work so.
        """

    @abstractmethod
    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        """Yield the model ready for many forwards with unchanging weights; its forwards do not communicate.

        All ranks enter and leave together; in between each may do as much as it has to.
        """

    @abstractmethod
    def state(self, frozen: bool = False) -> Iterable[tuple[str, Tensor]]:
        """Yield everything that resumes, in full shape: `weight/NAME`, `exp_avg/NAME`, ..., `buffer/NAME`.

        Weights that training leaves alone, beside an adapter, come from where the run started; `frozen` adds them.

        All ranks iterate to the end, in step, since each tensor may have to be gathered. Names and order are the same
        for every engine and world size. A tensor may be a live one: copy what is kept beyond the next update.
        """

    @abstractmethod
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over what `state` yielded, from any engine and world size. Each name is looked up once."""

    def export(self) -> dict[str, Tensor]:
        """Return the weights and buffers in full shape, on the CPU of rank 0; elsewhere nothing. All ranks take part."""
        tensors = {}
        for key, value in self.state(frozen=True):
            kind, name = key.split("/", 1)
            if kind in ("weight", "buffer") and self.ranks.is_main:
                tensors[name] = value.detach().cpu()
        return tensors

    def all_sum(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Sum scalars over the data-parallel ranks. All ranks take part."""
        return collectives.sum_scalars(values, self.dp_group)

    def share(self, count: int, batch_size: int) -> list[tuple[list[int], bool]]:
        """Cut items 0 .. count - 1 into this rank's batches, equally many on each data-parallel rank.

        Returns:
            (item numbers, whether they count); a batch that does not count repeats an item to keep step with others.
        """
        if count == 0:
            return []
        rank, size = self.ranks.dp_rank, self.ranks.dp_size
        mine = list(range(rank, count, size))
        batches = [(mine[i : i + batch_size], True) for i in range(0, len(mine), batch_size)]
        most = math.ceil(math.ceil(count / size) / batch_size)
        return batches + [([0], False)] * (most - len(batches))

    def gather(self, values: Mapping[int, Tensor], count: int) -> list[Tensor]:
        """Bring together, on every rank, one tensor for each of the items 0 .. count - 1 that `share` handed out."""
        named = {str(i): v for i, v in values.items()}
        found: dict[str, Tensor] = {}
        for part in collectives.gather_tensors(named, self.dp_group):
            found |= part
        return [found[str(i)] for i in range(count)]

    @abstractmethod
    def close(self) -> None:
        """Give back what the engine holds (process groups, device memory)."""


def resolve(options: Any) -> tuple[type[Engine], Any]:
    """Return the engine that really runs under `options`, and its options."""
    chosen = registry.get("engine", options.name).choose(options)
    return registry.get("engine", chosen.name), chosen


def build_engine(
    role: str,
    model: nn.Module,
    *,
    options: EngineOptions,
    hardware: HardwareOptions,
    precision: str,
    optim: Any = None,
    batch: BatchSizes | None = None,
) -> Engine:
    """Put `model` under the engine that `options.name` names; without `optim` it is frozen."""
    kind, options = resolve(options)
    engine: Callable[..., Engine] = kind  # each kind has the constructor of `native.py`
    choice = set_attention(model, hardware, precision, optim is not None)
    set_loss_kernel(model, hardware, shape_of(options, processes.world_size()).tp > 1)
    built = engine(
        role,
        model,
        options=options,
        hardware=hardware,
        precision=precision,
        optim=optim,
        batch=batch or BatchSizes(processes.world_size()),
    )
    built.attention = choice
    return built
