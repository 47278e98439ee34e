"""Which dtype a computation runs in. The weights decide; an active `torch.autocast` overrides them."""

import torch
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype heavy work runs in: autocast's where it is active, else that of `weight`."""
    kind = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return weight.dtype


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for sums and exponentials: at least float32, float64 for float64."""
    return torch.promote_types(dtype, torch.float32)
