"""What this machine has: packages and whether they fit, devices and what they compute, room, and working collectives.

What follows from it, and how it is shown, is in `doctor.py`.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

CORE = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "hydra-core", "rich")
OPTIONAL = (
    "accelerate",
    "deepspeed",
    "flash-attn",
    "vllm",
    "wandb",
    "tensorboard",
    "peft",
    "bitsandbytes",
)
IMPORTED = {"accelerate": "accelerate", "deepspeed": "deepspeed", "flash-attn": "flash_attn"}
"""Packages that can be installed and yet not work, built as they are against a certain torch -> what to import."""

COMPILERS = ("cc", "gcc", "clang")
ABSENT = "not installed"
_IMPORT_S = 180


def versions() -> dict[str, str]:
    """Return package -> version, or `not installed`."""
    packages = {name: version(name) for name in ("distllm", *CORE, *OPTIONAL)}
    return {"python": platform.python_version(), **packages}


def version(package: str) -> str:
    """Return the installed version, or `not installed`."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ABSENT


def is_installed(package: str) -> bool:
    """Tell whether a package is installed."""
    return version(package) != ABSENT


def mismatches() -> list[str]:
    """List installed packages that are older than distllm needs; nothing in a checkout that is not installed."""
    from packaging.requirements import Requirement

    found = []
    for text in _requirements():
        needed = Requirement(text)
        have = version(needed.name)
        if have != ABSENT and not needed.specifier.contains(have, prereleases=True):
            found.append(
                f"{needed.name} {have} does not fit: distllm needs {needed.name}{needed.specifier}. "
                f'Type: pip install "{needed.name}{needed.specifier}"'
            )
        elif have == ABSENT and needed.marker is None:
            found.append(f"{needed.name} is missing. Type: pip install {needed.name}")
    return found


def _requirements() -> list[str]:
    try:
        return metadata.requires("distllm") or []
    except metadata.PackageNotFoundError:
        return []


def import_problems() -> dict[str, str]:
    """Return package -> the last line of its error, for optional packages that are installed and cannot be imported.

    Each is tried in a process of its own: one built for another torch may take the process down.
    """
    found = {}
    for package, module in IMPORTED.items():
        if is_installed(package):
            command = [sys.executable, "-c", f"import {module}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_S)
            except subprocess.TimeoutExpired:
                found[package] = f"the import takes longer than {_IMPORT_S} s"
                continue
            if done.returncode != 0:
                code = f"exit code {done.returncode}"
                found[package] = (done.stderr.strip().splitlines() or [code])[-1]
    return found


def machine() -> dict[str, Any]:
    """Return what the operating system and torch tell of this machine."""
    import torch

    from distllm.config.plan import available_bytes
    from distllm.engines.hardware import available_cores, has_native_bf16
    from distllm.engines.probe import backends

    memory, libraries, shared = available_bytes(), backends(), shm_bytes()
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores for this process": available_cores(),
        "memory": _gib(memory) if memory else "unknown",
        "disk free here": _gib(shutil.disk_usage(Path.cwd()).free),
        "shared memory": _gib(shared) if shared is not None else "none",
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "native bf16 on the CPU": "yes" if has_native_bf16(torch.device("cpu")) else "no",
        "CUDA of torch": torch.version.cuda or "none: a build for CPUs",
        "CUDA of the driver": driver_cuda() or "no driver",
        "gloo": libraries["gloo"] or "none",
        "NCCL": libraries["nccl"] or "none",
        "GPUs": len(gpus()) or "none that torch sees",
        "C compiler": next((c for c in COMPILERS if shutil.which(c)), "none"),
        "open files allowed": _open_files(),
    }


def gpus() -> list[dict[str, Any]]:
    """Describe each GPU that torch sees: name, memory, compute capability, and which precisions it has natively."""
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        found.append(
            {
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30, 1),
                "capability": f"{properties.major}.{properties.minor}",
                "bf16": capability >= (8, 0),  # since Ampere
                "fp8": capability >= (8, 9),  # since Ada and Hopper
            }
        )
    return found


def driver_cuda() -> str:
    """Return the newest CUDA that the NVIDIA driver runs; empty without a driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    try:
        text = subprocess.run([command], capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.search(r"CUDA Version: *([\d.]+)", text)
    return found[1] if found else ""


def shm_bytes() -> int | None:
    """Return the size of /dev/shm; None where there is none."""
    return shutil.disk_usage("/dev/shm").total if Path("/dev/shm").is_dir() else None


def collectives() -> dict[str, tuple[bool, str]]:
    """Let two processes add a number over each library that can work here; NCCL needs two GPUs."""
    from distllm.engines.probe import backends, try_collective

    libraries = backends()
    found = {}
    if libraries["gloo"]:
        found["gloo, 2 processes"] = try_collective("gloo")
    if libraries["nccl"] and len(gpus()) >= 2:
        found["NCCL, 2 GPUs"] = try_collective("nccl")
    return found


def _open_files() -> Any:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def can_write_here() -> bool:
    """Tell whether the working directory can be written to."""
    return os.access(Path.cwd(), os.W_OK)
