"""What the benchmarks share: the machine in words, and the closing JSON line."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def machine(threads: int) -> dict[str, Any]:
    """Describe the hardware that a figure was measured on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), "")
    return {
        "cpu": model or platform.processor() or platform.machine(),
        "threads": threads,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def headline(
    *,
    name: str,
    ours: float,
    peer: float,
    ratio: float,
    unit: str,
    runs: int,
    hardware: dict[str, Any],
    packages: Sequence[str],
    **more: Any,
) -> dict[str, Any]:
    """Build the closing JSON line; a ratio above 1 means that ours is better."""
    versions = {p: version(p) for p in ("torch", *packages)}
    return {
        "name": name,
        "ours": round(ours, 4),
        "peer": round(peer, 4),
        "ratio": round(ratio, 3),
        "unit": unit,
        "runs": runs,
        "hardware": hardware,
        "versions": {"python": platform.python_version(), **versions},
        **more,
    }
