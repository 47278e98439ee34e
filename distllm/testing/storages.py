"""Counts the bytes of real tensors while code runs: what is alive after each operation, and at the worst moment.

Knows nothing of models or formulas: it sees storages come out of operations and go, and asks for their sizes. What a
kernel takes and gives back inside itself is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from distllm.types import Batch, sum_by_key

Owners = Callable[[], Mapping[str, Iterable[Tensor]]]
"""Returns class -> the tensors that belong to it now, such as `gradients` -> those of the parameters."""


class StorageTracker(TorchDispatchMode):
    """Sees every operation's results and remembers the most bytes alive together, per class and in all.

    A storage belongs to the first class that holds it; what no class holds is an activation or a temporary.
    """

    def __init__(self, lasting: Owners, passing: Owners) -> None:
        """Begin with what exists.

        Args:
            lasting: classes that stay the same from one `start` to the next, such as weights.
            passing: classes that change at any operation. Their tensors may shrink to nothing and grow again, as a
                sharded engine's gathered weights do.
        """
        super().__init__()
        self.peaks: dict[str, int] = {}
        """Class -> most bytes, each class at its own worst moment; with `activations` (what has no owner), `working`
        (those and `communication` together) and `total`."""
        self._lasting, self._passing = lasting, passing
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._class_of: dict[int, str] = {}
        self._is_counting = False
        for group in (*lasting().values(), *passing().values()):
            self._watch(group)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._watch(tree_iter(out)) and self._is_counting:
            self._measure()
        return out

    def start(self) -> None:
        """Begin to count. Call it between two steps: what has no owner then is a buffer for gradients."""
        self._is_counting = True
        self._class_of = dict.fromkeys(self._live, "gradients")
        for name, group in self._lasting().items():
            self._class_of |= dict.fromkeys(_storages(group), name)

    def _watch(self, tensors: Iterable[Any]) -> bool:
        """Take note of the storages of `tensors`; return whether one is new: only then there can be a new peak."""
        before = len(self._live)
        for key, storage in _storages(t for t in tensors if isinstance(t, Tensor)).items():
            if key not in self._live:
                self._live[key] = weakref.ref(storage, self._gone(key)), storage.nbytes()
        return len(self._live) > before

    def _gone(self, key: int) -> Callable[[Any], None]:
        def forget(_: Any) -> None:
            self._live.pop(key, None)
            self._class_of.pop(key, None)

        return forget

    def _measure(self) -> None:
        sizes = {key: size for key, (_, size) in list(self._live.items())}
        classes: dict[str, int] = {}
        for name, group in self._passing().items():
            for key, storage in _storages(group).items():
                if sizes.pop(key, None) is not None:
                    classes[name] = classes.get(name, 0) + storage.nbytes()
        for key, size in sizes.items():
            name = self._class_of.get(key, "activations")
            classes[name] = classes.get(name, 0) + size
        total = sum(classes.values())
        working = classes.get("activations", 0) + classes.get("communication", 0)
        for name, size in (*classes.items(), ("total", total), ("working", working)):
            self.peaks[name] = max(size, self.peaks.get(name, 0))


def _storages(tensors: Iterable[Tensor]) -> dict[int, Any]:
    """Return id -> storage behind each tensor; a sharded tensor has the storage of its local part."""
    parts = (getattr(t, "_local_tensor", t) for t in tensors if t.device.type != "meta")
    return {id(s): s for s in (p.untyped_storage() for p in parts)}


def measure_steps(engine: Any, objective: Any, micro_batches: Sequence[Batch]) -> StorageTracker:
    """Train three steps on the same micro-batches; count the last: moments exist, DDP has settled on its buckets."""
    parameters = list(engine.model.parameters())
    wrapped = _fsdp_parameters(getattr(engine, "caller", engine.model))
    zero = _zero_tensors if getattr(engine, "_is_zero", False) else lambda _: {}

    def lasting() -> dict[str, Iterable[Tensor]]:
        state = engine.optimizer.state if engine.optimizer is not None else {}
        state = engine._moments() if zero(engine) else state
        values = (getattr(b, f.name) for b in micro_batches for f in fields(b))
        return {
            "weights": [
                *parameters,
                *engine.model.buffers(),
                *_scales(engine.model),
                *zero(engine).get("weights", ()),
            ],
            "optimizer": [t for s in state.values() for t in s.values() if isinstance(t, Tensor)],
            "inputs": [v for v in values if isinstance(v, Tensor)],
        }

    def passing() -> dict[str, Iterable[Tensor]]:
        own = zero(engine)
        gathered = [t for p in wrapped for t in p.all_gather_outputs]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return {
            "gradients": [*gradients, *own.get("gradients", ())],
            "communication": [*gathered, *own.get("communication", ())],
        }

    totals = engine.all_sum(sum_by_key(objective.weights(b) for b in micro_batches))
    tracker = StorageTracker(lasting, passing)
    with tracker:
        for step in range(3):
            if step == 2:
                tracker.start()
            engine.forward_backward(objective, micro_batches, totals)
            engine.update(1e-3)
    return tracker


def _scales(model: Any) -> list[Tensor]:
    """List what stands beside weights that are held in fewer bits."""
    held = (m.scales for m in model.modules() if hasattr(m, "scales"))
    return [t for s in held for t in (s.absmax, s.code, s.offset, s.state2.absmax, s.state2.code)]


def _fsdp_parameters(model: Any) -> list[Any]:
    """List what FSDP2 keeps per parameter, its gathered form among it."""
    states = (getattr(m, "_get_fsdp_state", None) for m in model.modules())
    groups = (state()._fsdp_param_group for state in states if state)
    return [parameter for group in groups if group for parameter in group.fsdp_params]


def _zero_tensors(engine: Any) -> dict[str, list[Tensor]]:
    """List what DeepSpeed's optimizer holds beside the tensors of the model, by class."""
    library, parameters, masters = (
        engine.optimizer,
        list(engine.model.parameters()),
        engine._masters(),
    )
    gradients = [*(p.grad_accum for p in parameters if getattr(p, "grad_accum", None) is not None)]
    gradients += [m.grad for m in masters if m.grad is not None]
    averaged = getattr(library, "averaged_gradients", None) or {}
    gradients += [t for group in averaged.values() for t in group or () if t is not None]
    gradients += getattr(library, "fp32_groups_gradients_flat", ())  # stage 1 with bf16 weights
    if getattr(library, "grad_partitions_flat_buffer", None) is not None:
        gradients.append(library.grad_partitions_flat_buffer)
    buckets = [bucket.buffer for bucket in getattr(library, "ipg_buckets", {}).values()]
    buffers = [t for b in buckets for t in ([b] if isinstance(b, Tensor) else b or ())]
    if engine._is_cut:
        masters = [*masters, *(p.ds_tensor for p in parameters)]
        buffers += [p.data for p in parameters]
    return {"weights": masters, "gradients": gradients, "communication": buffers}
