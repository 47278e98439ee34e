"""Initial weights. Each parameter is drawn in full shape from its own generator, seeded by (seed, parameter name).

So the weights do not depend on the order of construction, on other parameters, or on how a model is sharded later.
"""

import fnmatch
import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

InitRules = Mapping[str, tuple[str, float]]
"""Parameter-name pattern -> ("normal", std), ("uniform", bound) or ("constant", value); the first that matches applies."""


def initial_value(rules: InitRules, name: str, shape: torch.Size, seed: int) -> Tensor:
    """Draw the whole initial value of parameter `name` in float32 on the CPU.

    Raises:
        ValueError: no pattern of `rules` matches `name`.
    """
    for pattern, (kind, number) in rules.items():
        if not fnmatch.fnmatchcase(name, pattern):
            continue
        if kind == "constant":
            return torch.full(shape, number)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        if kind == "uniform":
            return torch.empty(shape).uniform_(-number, number, generator=generator)
        return torch.empty(shape).normal_(0.0, number, generator=generator)
    raise ValueError(f"parameter {name} matches no initialisation rule: {', '.join(rules)}")


def initial_weights(model: nn.Module, seed: int) -> Callable[[str], Tensor]:
    """Return a function: name of a parameter or buffer of `model` -> its whole initial value.

    It holds whatever becomes of the model, which may have no memory for its parameters now and a part of them later.
    """
    rules: InitRules = model.init_rules()  # type: ignore[operator]
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

    def value(name: str) -> Tensor:
        if name in buffers:
            return buffers[name]
        return initial_value(rules, name, shapes[name], seed)

    return value


@torch.no_grad()
def init_parameters(model: nn.Module, seed: int) -> None:
    """Set every parameter of `model` to its initial value, by the rules of `model.init_rules()`."""
    rules: InitRules = model.init_rules()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            parameter.copy_(initial_value(rules, name, parameter.shape, seed))
