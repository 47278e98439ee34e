"""Low-rank adapters: two small trained matrices beside each frozen one, put there by `peft`; switched off; merged back.

Here is what an adapter is and which parameters it trains. Optimizers and engines see nothing but `requires_grad`; who
stands in for a reference model is in `pipeline/reference.py`.

Reference: Hu et al. 2021, LoRA, arXiv 2106.09685: y = W x + (alpha / rank) B A x, with A drawn and B = 0 at the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from distllm.arch.quantised import hold_in_4bit, weights_given_back
from distllm.errors import ConfigError
from distllm.layers.init import initial_value
from distllm.layers.products import Linear

_NAME = "default"
"""What peft calls an adapter that is the only one."""
WHOLE_HEADS = ("last", "value", "classify", "tag")
"""Heads that a stage trains whole beside the adapter: most are new, and all are small."""


@dataclass(kw_only=True, slots=True)
class AdapterOptions:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685); with `adapter=none` every weight is trained."""

    name: str = "none"
    rank: int = 8
    """Inner width of the two matrices; a larger one can change the model in more directions and costs more."""
    alpha: float = 16.0
    """What the adapter adds is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that is zeroed in training; 0 in the stages that compare with a reference."""
    targets: list[str] = field(default_factory=list)
    """Linear layers that get an adapter, by their last name (`q_proj`). Empty: all in the blocks. Experts, embeddings
    and output matrices stay frozen."""
    base_bits: int = 32
    """Bits of each frozen weight of the blocks: 32 keeps it, 4 rounds it to NF4 and needs an eighth of the memory (QLoRA).
    The reference of DPO and RL is the rounded model then, and the exported one holds what was trained beside it."""
    lr: float = 0.0
    """Peak learning rate of a model that is trained through an adapter; 0 takes optim.lr. Adapters want a larger one than
    all weights do: about ten times."""


def attach(model: Any, options: AdapterOptions, seed: int) -> None:
    """Put adapters into `model` in place, and freeze what is not trained beside them.

    What `A` starts with depends on `seed` and its name alone. A model without memory keeps its `initial_weights`.

    Raises:
        ConfigError: a target is not the name of a linear layer in the blocks, or they have none.
    """
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_layers(model, options)
    if options.base_bits == 4:
        hold_in_4bit(model)
    inject_adapter_in_model(
        LoraConfig(
            r=options.rank,
            lora_alpha=options.alpha,  # type: ignore[arg-type]
            lora_dropout=options.dropout,
            target_modules=list(targets),
            bias="none",
        ),
        model,
        adapter_name=_NAME,
    )
    for layer in adapted(model).values():
        # Autocast chooses the dtype; peft's own cast to fp32 would leave each layer a copy of its input for the backward.
        layer.cast_input_dtype_enabled = False
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_trained(name, model.head_name))
        if is_adapter(name) and not parameter.is_meta:
            with torch.no_grad():
                parameter.copy_(_initial(name, parameter.shape, seed))
    earlier = vars(model).pop("initial_weights", None)
    if earlier is not None:
        shapes = {n: p.shape for n, p in model.named_parameters() if is_adapter(n)}
        model.initial_weights = lambda name: (
            _initial(name, shapes[name], seed) if name in shapes else earlier(plain_name(name))
        )


def target_layers(model: Any, options: AdapterOptions) -> dict[str, nn.Linear]:
    """Return full name -> linear layer of those that get an adapter. Needs no peft.

    Raises:
        ConfigError: a target is not the name of a linear layer in the blocks, or they have none.
    """
    inside = {
        id(m) for block in model.blocks() for m in block.modules() if type(m) in (nn.Linear, Linear)
    }
    found = {name: m for name, m in model.named_modules() if id(m) in inside}
    known = sorted({name.rpartition(".")[2] for name in found})
    wanted = options.targets or known
    unknown = [t for t in wanted if t not in known]
    if not found:
        raise ConfigError(
            f"adapter={options.name} stands beside linear layers, and the blocks of this model have none. Set adapter=none."
        )
    if unknown:
        raise ConfigError(
            f"adapter.targets={list(options.targets)}: {', '.join(unknown)} names no linear layer in the "
            f"blocks of this model. It has: {', '.join(known)}."
        )
    return {name: m for name, m in found.items() if name.rpartition(".")[2] in wanted}


def matrix_shapes(layer: nn.Linear, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of A and B beside `layer`."""
    return (rank, layer.in_features), (layer.out_features, rank)


def is_adapter(name: str) -> bool:
    """Say whether a parameter belongs to an adapter, by its name."""
    return f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name


def plain_name(name: str) -> str:
    """Return what a frozen parameter is called in the model without adapters."""
    return name.replace(".base_layer.", ".")


def _is_trained(name: str, head: str) -> bool:
    return is_adapter(name) or (head in WHOLE_HEADS and name.startswith("head."))


def _initial(name: str, shape: torch.Size, seed: int) -> Tensor:
    """Draw A as torch draws a linear layer, uniform within 1 / sqrt(inputs); B is 0, so that nothing changes at first."""
    kind = ("uniform", shape[1] ** -0.5) if ".lora_A." in name else ("constant", 0.0)
    return initial_value({"*": kind}, name, shape, seed)


def adapted(model: nn.Module) -> dict[str, Any]:
    """Return full name -> layer of those that have an adapter; empty for a model without."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Let `model` be, inside the `with`, what it was before any adapter: same weights, no copy.

    peft's own switch also flips `requires_grad`, under which sharded engines have laid their plans.
    """
    layers = list(adapted(model).values())
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


def merged(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the adapters to the weights beside them: the tensors of a model without adapters, equal in what it computes.

    Args:
        model: says where adapters are and their factor; of its own weights those in 4 bits alone are read.
        tensors: full parameters and buffers by name, as an engine exports them; empty gives empty.
    """
    plain = {plain_name(n): t for n, t in tensors.items() if not is_adapter(n)}
    if tensors:
        plain |= {plain_name(n): t for n, t in weights_given_back(model).items()}
    for path, layer in adapted(model).items() if tensors else ():
        down, up = (tensors[f"{path}.lora_{x}.{_NAME}.weight"] for x in "AB")
        plain[f"{path}.weight"] = plain[f"{path}.weight"] + (up @ down) * layer.scaling[_NAME]
    return plain
