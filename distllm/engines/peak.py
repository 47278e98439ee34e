"""The most floating-point operations per second that a device is credited with: the yardstick of utilisation.

For GPUs that is the datasheet's dense rate, as every published figure has it; for a CPU, which has no such figure, what
large matrix products reach on it.
"""

import time
from collections.abc import Mapping

import torch

from distllm.engines.cluster import ClusterOptions
from distllm.engines.options import HardwareOptions

DATASHEET_BF16 = {"H200": 989e12, "H100 80GB HBM3": 989e12, "A100": 312e12}
"""Part of the name that the driver reports -> dense bf16 rate. The rate with sparsity, twice as high, halves every figure."""
_SIZE = 1024
_GPU_SIZE = 8192
"""Smaller products leave a part of a large GPU idle."""
_BUDGET_S = 0.1


def peak_flops_per_s(
    hardware: HardwareOptions,
    device: torch.device,
    dtype: torch.dtype,
    known: Mapping[str, float],
) -> tuple[str, float]:
    """Return where the figure of one process comes from, and the figure; what is in `known` is not measured again."""
    is_bf16 = dtype == torch.bfloat16
    if isinstance(hardware, ClusterOptions) and device.type == "cuda":
        rate = hardware.peak_bf16_tflops if is_bf16 else hardware.peak_fp32_tflops
        return f"{hardware.gpu}, datasheet", 1e12 * rate
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for part, rate in DATASHEET_BF16.items() if is_bf16 else ():
        if part in name:
            return f"{part}, datasheet", rate
    return measured_peak(device, dtype, known)


def measured_peak(
    device: torch.device, dtype: torch.dtype, known: Mapping[str, float]
) -> tuple[str, float]:
    """Return what large products reach on this device, as `peak_flops_per_s` does."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    kind = str(dtype).removeprefix("torch.")
    source = f"{kind} products measured on {name}, {torch.get_num_threads()} threads"
    return source, known.get(source) or measured(device, dtype)


def measured(device: torch.device, dtype: torch.dtype) -> float:
    """Multiply matrices for about a tenth of a second; return the fastest product's rate. Draws no random number."""
    size = _GPU_SIZE if device.type == "cuda" else _SIZE
    a = torch.ones(size, size, dtype=dtype, device=device)
    out = torch.empty_like(a)
    times = []
    started = time.perf_counter()
    while len(times) < 2 or time.perf_counter() - started < _BUDGET_S:
        begun = time.perf_counter()
        torch.mm(a, a, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return 2 * size**3 / min(times)
