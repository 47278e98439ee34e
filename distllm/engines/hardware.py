"""The machine as one process sees it: device, threads, allocator, and which precision it runs natively."""

import ctypes
import os
from pathlib import Path

import torch

from distllm.engines.options import HardwareOptions
from distllm.engines.processes import local_world_size
from distllm.errors import ConfigError, EngineError

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
PRECISIONS = ("auto", "fp32", "bf16")


def resolve_device(name: str, local_rank: int | None = None) -> torch.device:
    """Turn `auto | cpu | cuda` into a device; with `local_rank`, into that rank's own GPU.

    Raises:
        EngineError: cuda was asked for and there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"hardware.device={name} is unknown. Known: auto, cpu, cuda.")
    if name == "cuda" and not torch.cuda.is_available():
        raise EngineError(
            "hardware.device=cuda, but torch sees no CUDA device here. Set hardware.device=cpu or auto."
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and local_rank is not None:
        return torch.device(name, local_rank)
    return torch.device(name)


def has_native_bf16(device: torch.device) -> bool:
    """True where bf16 matrix products run in hardware (CPU: avx512_bf16 or amx; CUDA: since Ampere)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.exists() else []
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """Turn `auto | fp32 | bf16` into the dtype of the heavy arithmetic; master weights stay fp32.

    Raises:
        ConfigError: the name is unknown or not available yet.
    """
    if name == "fp8":
        raise ConfigError(
            "train.precision=fp8 is not available in this version. Set auto, fp32 or bf16."
        )
    if name not in PRECISIONS:
        raise ConfigError(f"train.precision={name} is unknown. Known: {', '.join(PRECISIONS)}.")
    if name == "auto":
        name = "bf16" if has_native_bf16(device) else "fp32"
    return torch.bfloat16 if name == "bf16" else torch.float32


def available_cores() -> int:
    """Cores this process may run on: its affinity mask, cut by a container's CPU quota."""
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.exists():
        limit, period = quota.read_text().split()[:2]
        if limit != "max":
            cores = min(cores, max(1, int(limit) // int(period)))
    return cores


def tune_cpu(options: HardwareOptions) -> int:
    """Set threads and allocator for CPU training; return the number of threads.

    glibc gives memory blocks of some MiB back to the kernel at every free, so each step would fault its
    activations in anew; raising two thresholds keeps them. The number of threads depends on the machine alone,
    never on its load, because it enters the order of floating-point sums and so the bits of a run. Processes on one
    machine share its cores.
    """
    shared = max(1, available_cores() // local_world_size())
    threads = options.threads or int(os.environ.get("OMP_NUM_THREADS", 0)) or shared
    torch.set_num_threads(threads)
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError):
        pass  # another C library: nothing to tune
    return threads
