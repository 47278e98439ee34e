"""`distllm doctor`: what this machine has, what it can run, and what is missing for the rest."""

import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from distllm.cli.arguments import split

HELP = """
usage: distllm doctor [format=json]

Shows versions, cores, memory, disk, what the processor computes natively, which optional packages are there, and
what follows from it. Changes nothing and touches no network.
"""
OWN = {"format": "text (default) or json"}

_CORE = ("torch", "transformers", "tokenizers", "datasets", "safetensors", "hydra-core", "rich")
_OPTIONAL = ("accelerate", "deepspeed", "flash-attn", "vllm", "wandb", "tensorboard")
_USES = {"wandb": "tracking=wandb", "tensorboard": "tracking=tensorboard"}
"""Optional package -> the setting that needs it."""


def run(arguments: Sequence[str]) -> int:
    """Print the findings."""
    given = split("doctor", arguments, OWN)
    if given.overrides:
        from distllm.errors import ConfigError

        raise ConfigError(f"`{given.overrides[0]}`: `distllm doctor` takes format=json only.")
    found = {"versions": _versions(), "machine": _machine(), "advice": _advice()}
    if given.own.get("format") == "json":
        print(json.dumps(found, indent=2))
        return 0
    for title in ("versions", "machine"):
        print(title)
        for label, value in found[title].items():
            print(f"  {label:<22} {value}")
    print("what follows")
    for line in found["advice"]:
        print(f"  - {line}")
    return 0


def _versions() -> dict[str, str]:
    packages = {name: _version(name) for name in ("distllm", *_CORE, *_OPTIONAL)}
    return {"python": platform.python_version(), **packages}


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _machine() -> dict[str, Any]:
    import torch

    from distllm.config.plan import available_bytes
    from distllm.engines.hardware import available_cores, has_native_bf16

    memory = available_bytes()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cores for this process": available_cores(),
        "memory": _gib(memory) if memory else "unknown",
        "disk free here": _gib(shutil.disk_usage(Path.cwd()).free),
        "shared memory": _gib(shutil.disk_usage("/dev/shm").total)
        if Path("/dev/shm").is_dir()
        else "none",
        "CPU instructions": torch.backends.cpu.get_cpu_capability(),
        "native bf16 on the CPU": "yes" if has_native_bf16(torch.device("cpu")) else "no",
        "GPUs": ", ".join(gpus) or "none that torch sees",
        "C compiler": next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "none"),
        "open files allowed": _open_files(),
    }


def _open_files() -> Any:
    try:
        import resource
    except ImportError:  # Windows
        return "unknown"
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _advice() -> list[str]:
    import torch

    from distllm.engines.hardware import has_native_bf16, resolve_device

    device = resolve_device("auto")
    lines = [f"hardware.device=auto runs on {device.type}."]
    if has_native_bf16(device):
        lines.append("train.precision=auto computes in bf16, which this hardware has natively.")
    else:
        lines.append("train.precision=auto computes in fp32: bf16 is emulated here, and slower.")
    if device.type == "cpu" and torch.version.cuda:
        lines.append(
            f"torch is built for CUDA {torch.version.cuda} and sees no GPU: check the driver with nvidia-smi."
        )
    if not any(shutil.which(c) for c in ("cc", "gcc", "clang")):
        lines.append("engine.compile=true needs a C compiler on a CPU: install gcc.")
    if shutil.disk_usage(Path.cwd()).free < 2 * 2**30:
        lines.append(
            "Less than 2 GiB of disk are free here: checkpoints may not fit. Set run.dir elsewhere."
        )
    for package, setting in _USES.items():
        if _version(package) == "not installed":
            lines.append(f'{setting} needs {package}: pip install "distllm[{package}]".')
    if not os.access(Path.cwd(), os.W_OK):
        lines.append("This directory cannot be written to: set run.dir to one that can.")
    return lines


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"
