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
        (those and `communication` together) and `total`, which leaves out what is meant for the host (`host`)."""
        self._lasting, self._passing = lasting, passing
        self._live: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._class_of: dict[int, str] = {}
        self._is_counting = self._has_grown = False
        for group in (*lasting().values(), *passing().values()):
            self._watch(group)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._has_grown and self._is_counting:
            self._measure()  # by now what the last operation made has been put in its place
        out = func(*args, **(kwargs or {}))
        self._has_grown = self._watch(tree_iter(out))
        if self._has_grown and self._is_counting:
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
        total = sum(classes.values()) - classes.get("host", 0)
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
        own = zero(engine)
        return {
            "weights": [
                *parameters,
                *engine.model.buffers(),
                *_scales(engine.model),
                *own.get("weights", ()),
            ],
            "optimizer": [t for s in state.values() for t in s.values() if isinstance(t, Tensor)],
            "inputs": [v for v in values if isinstance(v, Tensor)],
            "host": own.get("host", ()),
        }

    def passing() -> dict[str, Iterable[Tensor]]:
        own = zero(engine)
        gathered = [t for p in wrapped for t in p.all_gather_outputs]
        gradients = [p.grad for p in parameters if p.grad is not None]
        return {
            "host": own.get("host", ()),
            "communication": [*gathered, *own.get("communication", ())],
            "gradients": [*gradients, *own.get("gradients", ())],
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
    """List what DeepSpeed's optimizer holds beside the tensors of the model, by class.

    On a CPU the host's memory is the same memory; `host` is what the library keeps there on a machine with GPUs.
    """
    library, parameters, masters = (
        engine.optimizer,
        list(engine.model.parameters()),
        engine._masters(),
    )
    flat = [m.grad for m in masters if m.grad is not None]
    if getattr(library, "grad_partitions_flat_buffer", None) is not None:
        flat.append(library.grad_partitions_flat_buffer)
    gradients = [*(p.grad_accum for p in parameters if getattr(p, "grad_accum", None) is not None)]
    for name in ("averaged_gradients", "all_grad_tensors"):
        groups = (getattr(library, name, None) or {}).values()
        gradients += [t for group in groups for t in group or () if t is not None]
    gradients += getattr(library, "fp32_groups_gradients_flat", ())  # stage 1 with bf16 weights
    buckets = [bucket.buffer for bucket in getattr(library, "ipg_buckets", {}).values()]
    buffers = [t for b in buckets for t in ([b] if isinstance(b, Tensor) else b or ())]
    buffers += _present(library, "temp_grad_buffer_for_gpu_offload")
    parts = []
    if engine._is_cut:
        parts = [p.ds_tensor for p in parameters]
        buffers += [p.data for p in parameters]
    host: list[Tensor] = []
    if engine.options.offload_optimizer:
        states = (t for s in engine._moments().values() for t in s.values())
        host += [*masters, *flat, *(t for t in states if isinstance(t, Tensor))]
        host += getattr(library, "param_buffer_of_bit16_for_cpu_offload_groups", ())
        host += getattr(library, "accumulated_grads_in_cpu", {}).values()
        host += _present(library, "temp_grad_buffer_for_cpu_offload")
        masters, flat = [], []
    if engine.options.offload_param:
        host, parts = [*host, *parts], []
    return {
        "weights": [*masters, *parts],
        "gradients": [*gradients, *flat, *_present(library, "grads_in_partition")],
        "communication": buffers,
        "host": host,
    }


def _present(library: Any, name: str) -> list[Tensor]:
    found = getattr(library, name, None)
    return [] if found is None else [found]
