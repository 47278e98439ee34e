"""DeepSpeed: ZeRO stages 0 to 3, with moments or weights in host memory if wanted.

The library's JSON is made in `deepspeed_config.py`. Its own checkpoints are never written: state goes in and out by
parameter name, in full shape, as it does with every engine.

Reference: Rajbhandari et al. 2020, ZeRO, arXiv 1910.02054; Ren et al. 2021, ZeRO-Offload, arXiv 2101.06840.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from distllm import registry
from distllm.engines.deepspeed_config import DeepSpeedOptions, library_settings
from distllm.engines.hardware import resolve_device, resolve_precision
from distllm.engines.memory import prepare_blocks
from distllm.engines.native import Caller, NativeEngine, persistent_buffers
from distllm.engines.options import BatchSizes, HardwareOptions
from distllm.errors import ConfigError, UserError
from distllm.registry import register


@register("engine")
class DeepSpeed(NativeEngine):
    """One DeepSpeed engine per model. A frozen model needs one only where its weights are cut (stage 3)."""

    Options = DeepSpeedOptions
    builds_on_meta = True
    averages = True
    options: DeepSpeedOptions

    @classmethod
    def problems(
        cls,
        options: DeepSpeedOptions,
        *,
        hardware: HardwareOptions,
        precision: str,
        optim: Any,
        batch: BatchSizes,
    ) -> list[str]:
        if importlib.util.find_spec("deepspeed") is None:
            return [
                "engine=deepspeed needs the package deepspeed, which is not installed. "
                'Type pip install "distllm[deepspeed]", or set engine=fsdp.'
            ]
        try:
            device = resolve_device(hardware.device)
            dtype = resolve_precision(precision, device)
        except UserError:
            return []  # is reported by others
        return library_settings(options, optim, batch, device, dtype)[1]

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self._plain.parameters())

    @property
    def _is_cut(self) -> bool:
        """Whether each rank holds a part of every weight."""
        return self.options.zero_stage == 3

    @property
    def _is_zero(self) -> bool:
        """Whether the optimizer is DeepSpeed's, with fp32 master weights of its own."""
        return self.optimizer is not None and self.options.zero_stage > 0

    def _place(self, model: nn.Module) -> nn.Module:
        self.library = _library(self.device)
        self.settings, problems = library_settings(
            self.options, self.optim, self.batch, self.device, self.dtype
        )
        if problems:
            raise ConfigError("\n".join(problems))
        initial = vars(model).pop("initial_weights", None)
        # Shapes without memory: what rollouts are sampled with, and what the optimizer sees before weights are cut.
        self._plain = copy.deepcopy(model).to("meta")
        prepare_blocks(model, self.options)
        self._materialise(model, initial or model.state_dict(keep_vars=True).__getitem__)
        return model

    @torch.no_grad()
    def _materialise(self, model: nn.Module, initial: Callable[[str], Tensor]) -> None:
        """Put whole weights on the device, module by module, and keep a part of each if they are to be cut."""
        bf16 = self.dtype == torch.bfloat16 and self.options.zero_stage > 0
        saved = persistent_buffers(model)
        for prefix, module in reversed(list(model.named_modules())):  # children first
            own = prefix and f"{prefix}."
            for leaf, parameter in module.named_parameters(recurse=False):
                value = initial(own + leaf).detach().to(self.device)
                value = value.to(torch.bfloat16) if bf16 else value
                module._parameters[leaf] = nn.Parameter(value, parameter.requires_grad)
            for leaf, buffer in module.named_buffers(recurse=False):
                value = initial(own + leaf) if own + leaf in saved else buffer
                module._buffers[leaf] = value.to(self.device)
            if self._is_cut and module._parameters:
                self.library.zero.Init(module=module, config_dict_or_path=self.settings)

    def _wrap(self, caller: Caller) -> nn.Module:
        if self.optim is None and not self._is_cut:
            return caller
        if self._is_cut:
            self._gather_by_blocks(caller)
        engine, *_ = self.library.initialize(
            model=caller,
            optimizer=None if self.optim is None else self._torch_optimizer(),
            config=self.settings,
            dist_init_required=False,
        )
        return engine

    def _gather_by_blocks(self, caller: Caller) -> None:
        """Let the weights of a block be gathered together, and what lies around the blocks for the whole of a step.

        A loss reads the head's weight, and a tied head the embedding's, outside those modules' own forwards.
        """
        inside = set()
        for block in self.model.blocks():  # type: ignore[operator]
            self.library.utils.set_z3_leaf_module(block, True)
            inside |= {id(p) for p in block.parameters()}
        for parameter in self.model.parameters():
            if id(parameter) not in inside:
                self.library.zero.register_external_parameter(caller, parameter)

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        """Build the optimizer by the whole shapes (which parameters decay depends on them), for the real parameters."""
        optimizer = registry.get("optim", self.optim.name).build(self._plain, self.optim)
        names = {p: n for n, p in self._plain.named_parameters()}
        real = dict(self.model.named_parameters())
        for group in optimizer.param_groups:
            group["params"] = [real[names[p]] for p in group["params"]]
        return optimizer

    def _make_optimizer(self) -> Any:
        return self.caller.optimizer

    def _micro_step(self, is_last: bool) -> AbstractContextManager[Any]:
        self.caller.set_gradient_accumulation_boundary(is_last)  # type: ignore[operator]
        return nullcontext()

    def _backward(self, loss: Tensor) -> None:
        self.caller.backward(loss, scale_wrt_gas=False)  # type: ignore[operator]

    def update(self, lr: float) -> float | None:
        if not self._is_zero:
            return super().update(lr)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.caller.step()  # type: ignore[operator]
        if self.optimizer.overflow:  # the library's word for a norm that is not finite
            return None
        return float(self.caller.get_global_grad_norm())  # type: ignore[operator]

    def discard(self) -> None:
        if not self._is_zero:
            super().discard()
        elif hasattr(self.optimizer, "clear_hp_grads"):
            self.optimizer.clear_hp_grads()
            self.optimizer.clear_lp_grads()
        else:
            # The library forgets a gradient only when it skips a step, and it skips one that is not finite.
            parameter: Any = next(p for p in self.model.parameters() if p.requires_grad)
            if self._is_cut:
                poison = torch.full_like(parameter.ds_tensor, torch.nan, dtype=torch.float32)
                self.library.utils.safe_set_local_grad(parameter, poison)
            else:
                poison = torch.full_like(parameter, torch.nan, dtype=torch.float32)
                self.library.utils.safe_set_full_grad(parameter, poison)
            self.caller.step()  # type: ignore[operator]

    def infer(self, function: Callable[..., Any], *args: Any) -> Any:
        if not self._is_cut:
            return super().infer(function, *args)
        self.caller.eval()
        with torch.no_grad():
            return self.caller(_in_a_tuple, function, *args)[0]

    @contextmanager
    def sampling(self) -> Iterator[nn.Module]:
        """At stage 3, gather every weight once, into a model that DeepSpeed does not know."""
        if not self._is_cut:
            with super().sampling() as model:
                yield model
            return
        parameters = dict(self.model.named_parameters())
        with self.library.zero.GatheredParameters(list(parameters.values())):
            _assign(self._plain, {n: p.data for n, p in parameters.items()}, self.model)
            try:
                self._plain.eval()
                with torch.no_grad(), self._autocast():
                    yield self._plain
            finally:
                _assign(
                    self._plain, {n: p.data.to("meta") for n, p in parameters.items()}, self.model
                )

    def state(self, frozen: bool = False) -> Iterator[tuple[str, Tensor]]:
        if not self._is_zero and not self._is_cut:
            yield from super().state(frozen)
            return
        moments = next(filter(None, self._moments().values()), {})
        self._link_moments()
        for name, parameter in self.model.named_parameters():
            yield f"weight/{name}", self._whole(parameter)
            for key, value in moments.items():
                if value.ndim:
                    value = self.library.utils.safe_get_full_optimizer_state(parameter, key)
                yield f"{key}/{name}", value
        for name, buffer in persistent_buffers(self.model).items():
            yield f"buffer/{name}", buffer

    def _whole(self, parameter: Tensor) -> Tensor:
        """Return a weight in full shape, the fp32 master where there is one."""
        if self._is_zero:
            return self.library.utils.safe_get_full_fp32_param(parameter)
        with self.library.zero.GatheredParameters([parameter]):
            return parameter.data.clone()

    @torch.no_grad()
    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        if not self._is_zero and not self._is_cut:
            super().load_state(tensors)
            return
        kinds: dict[str, list[str]] = {}
        for key in tensors:
            kind, name = key.split("/", 1)
            kinds.setdefault(name, []).append(kind)
        self._prepare_moments(kinds, tensors)
        if self._is_cut:
            self.caller.empty_partition_cache()  # type: ignore[operator]
        for name, parameter in self.model.named_parameters():
            self._set(parameter, tensors[f"weight/{name}"])
            for kind in kinds[name]:
                if self._is_zero and kind not in ("weight", "step"):
                    self._set(parameter, tensors[f"{kind}/{name}"], kind)
        for name, buffer in persistent_buffers(self.model).items():
            buffer.copy_(tensors[f"buffer/{name}"])

    def _set(self, parameter: Any, full: Tensor, moment: str | None = None) -> None:
        """Take this rank's part of a weight, or of one of its moments, from a tensor in full shape."""
        utils = self.library.utils
        full = full.to(self.device)
        if self._is_cut:
            # The library's setters for whole tensors fail where the ranks do not divide the number of elements.
            full = _part(full, parameter.ds_tensor.numel(), self.ranks.dp_rank)
            set_weight, set_moment = (
                utils.safe_set_local_fp32_param,
                utils.safe_set_local_optimizer_state,
            )
        else:
            set_weight, set_moment = (
                utils.safe_set_full_fp32_param,
                utils.safe_set_full_optimizer_state,
            )
        if moment is not None:
            set_moment(parameter, full, moment)
            return
        (parameter.ds_tensor if self._is_cut else parameter.data).copy_(full)
        if self._is_zero:
            set_weight(parameter, full)

    def _moments(self) -> dict[Tensor, dict[str, Tensor]]:
        """Return the torch optimizer's state: this rank's part of the master weights, flat -> moments."""
        return self.caller.basic_optimizer.state  # type: ignore[union-attr, return-value]

    def _prepare_moments(
        self, kinds: Mapping[str, list[str]], tensors: Mapping[str, Tensor]
    ) -> None:
        """Make room for the moments of a checkpoint; the library has none before its first step."""
        names = {kind for found in kinds.values() for kind in found} - {"weight", "buffer"}
        if not self._is_zero or not names:
            return
        # A flat part holds many parameters and counts its steps once.
        steps = max(tensors[f"step/{n}"] for n, found in kinds.items() if "step" in found)
        state = self._moments()
        for flat in self._masters():
            state[flat] = {
                kind: steps.clone() if kind == "step" else torch.zeros_like(flat)
                for kind in sorted(names)
            }
        self._link_moments()

    def _link_moments(self) -> None:
        """Let the library find moments by parameter. It does so once, after the first group's first step: too early."""
        if self._moments() and hasattr(self.optimizer, "_lazy_init_hp_params_optimizer_state"):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _masters(self) -> list[Tensor]:
        """Return this rank's fp32 master weights, as the library lays them out."""
        for attribute in (
            "fp32_partitioned_groups_flat",  # stage 3
            "single_partition_of_fp32_groups",  # stages 1 and 2
            "fp32_groups_flat_partition",  # stage 1 with bf16 weights
        ):
            if hasattr(self.optimizer, attribute):
                return list(getattr(self.optimizer, attribute))
        raise AssertionError(f"unknown optimizer {type(self.optimizer)}")

    def _autocast(self) -> torch.autocast:
        # bf16 weights need no casts.
        enabled = self.dtype == torch.bfloat16 and self.options.zero_stage == 0
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    def close(self) -> None:
        if hasattr(self.caller, "destroy"):
            self.caller.destroy()  # type: ignore[operator]
        super().close()


def _in_a_tuple(model: Any, function: Callable[..., Any], *args: Any) -> tuple[Any]:
    """Box a result: the library's hooks look into what a module returns, and know tuples."""
    return (function(model, *args),)


def _part(full: Tensor, size: int, rank: int) -> Tensor:
    """Cut part number `rank` of `size` elements out of a flattened tensor; zeros stand behind its end."""
    part = full.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))


def _assign(model: nn.Module, weights: Mapping[str, Tensor], source: nn.Module) -> None:
    """Put tensors in the place of a model's parameters, without copying, and share the buffers of `source`."""
    for name, tensor in weights.items():
        home, _, leaf = name.rpartition(".")
        model.get_submodule(home)._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    for name, tensor in source.named_buffers():
        home, _, leaf = name.rpartition(".")
        model.get_submodule(home)._buffers[leaf] = tensor


_world: Any = None
"""The process group that the library was last set up with."""


def _library(device: torch.device) -> Any:
    """Import DeepSpeed and make it join the process group there is."""
    global _world
    os.environ.setdefault("LOCAL_RANK", "0")
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import groups

    log = logging.getLogger("DeepSpeed")
    log.setLevel(logging.WARNING)
    # The model returns a class of ours, in which the hooks of stage 3 find no tensors. They need not: `_gather_by_blocks`.
    log.addFilter(lambda record: "unknown inputs or outputs" not in record.getMessage())
    # It calls torch's collectives by names that torch has given up.
    warnings.filterwarnings("ignore", "`torch.distributed", FutureWarning, "torch.distributed")
    if device.type == "cpu":
        # Nothing that we use needs compiled code, and the library would look for a compiler and start it.
        deepspeed.ops.__dict__["__compatible_ops__"] = defaultdict(bool)
    if dist.group.WORLD is not _world:
        groups._release_process_group_references()
        deepspeed.init_distributed()
        _world = dist.group.WORLD
    return deepspeed
