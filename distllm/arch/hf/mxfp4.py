"""Unpacks matrices that are stored in MXFP4: four-bit numbers, and one power of two for every 32 of them.

Reference: Open Compute Project 2023, OCP Microscaling Formats (MX) Specification 1.0, sections 5.3.3 and 5.4.1.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = (*_HALF, *(-v for v in _HALF))
"""Code -> number: one sign bit, two of exponent, one of fraction."""
_BIAS = 127


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """Turn packed numbers into bfloat16, which holds every one of them exactly.

    Args:
        blocks: [num_experts, out, groups, 16] uint8, two numbers a byte, the first in the low half.
        scales: [num_experts, out, groups] uint8, exponents of two plus 127.

    Returns:
        [num_experts, in, out], as GPT-OSS stores experts that are not packed.
    """
    values = torch.tensor(_VALUES, dtype=torch.bfloat16, device=blocks.device)
    numbers = torch.stack((values[(blocks & 15).int()], values[(blocks >> 4).int()]), dim=-1)
    exponents = (scales.int() - _BIAS)[..., None, None]
    return torch.ldexp(numbers, exponents).flatten(2).transpose(1, 2).contiguous()


def unpack_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace every pair of `NAME_blocks` and `NAME_scales` by NAME."""
    found = dict(tensors)
    for name in tensors:
        base = name.removesuffix("_blocks")
        if base != name and f"{base}_scales" in found:
            found[base] = unpack(found.pop(name), found.pop(f"{base}_scales"))
    return found
