"""Weight matrices in the memory layout of the CPU's kernels for the length of one call.

A matrix product of few rows spends up to half of its time laying the weight out anew; a rollout makes the same product
once per token. So oneDNN's layout is made once and kept for the rollout. In bf16, where hardware multiplies it, the results
are bit-equal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from distllm.layers.products import Linear, product_dtype


@contextmanager
def packed(model: nn.Module, dtype: torch.dtype, num_rows: int) -> Iterator[None]:
    """Let the model's matrix products use packed copies of the weights inside the `with`.

    Packed are the linear layers and the head's `multiply`, on a CPU, if the weights have the dtype of the
    computation. The copies are made at the start and dropped at the end, so no later call can see stale ones.

    Args:
        model: any module.
        dtype: the one heavy work runs in.
        num_rows: of a typical product; a hint for the layout.
    """
    changed: list[tuple[nn.Module, str]] = []
    try:
        modules: list[Any] = list(model.modules()) if _is_supported(dtype) else []
        for module in modules:
            if type(module) in (nn.Linear, Linear):
                name, weight = "forward", module.weight
            elif hasattr(module, "multiply"):
                name, weight = "multiply", module.projection
            else:
                continue
            if weight.device.type == "cpu" and weight.dtype == dtype and _is_plain(weight):
                setattr(module, name, _product(weight, module.bias, num_rows))
                changed.append((module, name))
        yield
    finally:
        for module, name in changed:
            delattr(module, name)


def _is_supported(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype in (torch.bfloat16, torch.float32)


def _is_plain(weight: Tensor) -> bool:
    return type(weight.data) is Tensor and weight.is_contiguous()


def _product(weight: Tensor, bias: Tensor | None, num_rows: int) -> Callable[[Tensor], Tensor]:
    dtype, form = weight.dtype, product_dtype(weight.dtype, "cpu")
    layout = torch.ops.mkldnn._reorder_linear_weight(weight.detach().to(form), num_rows)
    bias = None if bias is None else bias.detach().to(dtype).to(form)
    return partial(_multiply, layout=layout, bias=bias, dtype=dtype, form=form)


def _multiply(
    x: Tensor, layout: Tensor, bias: Tensor | None, dtype: torch.dtype, form: torch.dtype
) -> Tensor:
    x = x.to(dtype).to(form)
    return torch.ops.mkldnn._linear_pointwise(x, layout, bias, "none", [], "").to(dtype)
