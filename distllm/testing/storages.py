"""Counts the bytes of real tensors while code runs: what is alive after each operation, and at the worst moment.

Knows nothing of models or formulas: it sees storages come out of operations and go, and asks each for its present size
(sharded engines shrink a storage to nothing while its owner lives on). What a kernel takes and gives back inside itself
is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

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
        self._watch(tree_iter(out))
        self._measure()
        return out

    def _watch(self, tensors: Iterable[Any]) -> None:
        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                for part in plain_tensors(tensor):
                    storage = part.untyped_storage()
                    self._live.setdefault(id(storage), weakref.ref(storage, self._gone(storage)))

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
