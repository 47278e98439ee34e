"""Counts the bytes of real tensors while code runs: what is alive after each operation, and at the worst moment.

Knows nothing of models or formulas: it sees storages come out of operations and go, and asks each for its present size
(sharded engines shrink a storage to nothing while its owner lives on). What a kernel takes and gives back inside itself
is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distllm.types import Batch, sum_by_key

Owners = Callable[[], Mapping[str, Iterable[Tensor]]]
"""Returns class -> the tensors that belong to it now, such as `weights` -> the parameters."""


class StorageTracker(TorchDispatchMode):
    """Sees every operation's results and remembers the most bytes alive together, per class and in all.

    A storage belongs to the first class that holds it; what no class holds is an activation or a temporary.
    """

    def __init__(self, owners: Owners) -> None:
        super().__init__()
        self.peaks: dict[str, int] = {}
        """Class -> most bytes, each class at its own worst moment; with `activations` and `total`."""
        self.at_peak: dict[str, int] = {}
        """Class -> bytes at the worst moment of `total`."""
        self._owners = owners
        self._live: dict[int, weakref.ref[Any]] = {}
        for group in owners().values():
            self._watch(group)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._watch(tree_iter(out)):
            self._measure()
        return out

    def _watch(self, tensors: Iterable[Any]) -> bool:
        """Take note of the storages of `tensors`; return whether one is new: only then there can be a new peak."""
        before = len(self._live)
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                for part in plain_tensors(tensor):
                    storage = part.untyped_storage()
                    if id(storage) not in self._live:
                        self._live[id(storage)] = weakref.ref(storage, self._gone(storage))
        return len(self._live) > before

    def _gone(self, storage: Any) -> Callable[[Any], None]:
        key = id(storage)
        return lambda _: self._live.pop(key, None)

    def _measure(self) -> None:
        sizes = {k: s.nbytes() for k, ref in self._live.items() if (s := ref()) is not None}
        classes = {}
        for name, group in self._owners().items():
            keys = {id(p.untyped_storage()) for t in group for p in plain_tensors(t)}
            classes[name] = sum(sizes.pop(k, 0) for k in keys)
        classes["activations"] = sum(sizes.values())
        classes["total"] = sum(classes.values())
        if classes["total"] > self.peaks.get("total", -1):
            self.at_peak = classes
        for name, size in classes.items():
            self.peaks[name] = max(size, self.peaks.get(name, 0))


def plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors with memory of their own that `tensor` consists of: itself, or a sharded tensor's local part."""
    local = getattr(tensor, "_local_tensor", None)
    yield tensor if local is None else local


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the sizes of all storages behind `tensors`, each once."""
    storages = {id(s): s for t in tensors for p in plain_tensors(t) if (s := p.untyped_storage())}
    return sum(s.nbytes() for s in storages.values())


def measure_steps(
    engine: Any, objective: Any, micro_batches: Sequence[Batch], steps: int = 2
) -> StorageTracker:
    """Train `steps` steps on the same micro-batches and count the bytes; the moments exist from the second step on."""
    parameters = list(engine.model.parameters())

    def owners() -> dict[str, Iterable[Tensor]]:
        state = engine.optimizer.state if engine.optimizer is not None else {}
        tensors = (t for b in micro_batches for t in _values(b) if isinstance(t, Tensor))
        return {
            "weights": [*parameters, *engine.model.buffers()],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "optimizer": [t for s in state.values() for t in s.values() if isinstance(t, Tensor)],
            "inputs": tensors,
        }

    totals = engine.all_sum(sum_by_key(objective.weights(b) for b in micro_batches))
    tracker = StorageTracker(owners)
    with tracker:
        for _ in range(steps):
            engine.forward_backward(objective, micro_batches, totals)
            engine.update(1e-3)
    return tracker


def _values(batch: Batch) -> list[Any]:
    """List the fields of a batch."""
    return [getattr(batch, f.name) for f in fields(batch)]
