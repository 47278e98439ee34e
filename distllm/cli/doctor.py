"""`distllm doctor`: what this machine has, what it can run, and what is missing for the rest."""

import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distllm.cli import checkup
from distllm.cli.arguments import split

HELP = """
usage: distllm doctor [format=json] [try=false]

Shows versions and whether they fit together, cores, memory, disk, GPUs and what they compute natively; imports the
optional packages that are installed; lets two processes talk to each other; and says what this machine can run and
what to install for the rest. Changes nothing and touches no other machine.

Exit code: 0, or 1 when something that every run needs is broken (so it can serve as a container's health check).
"""
OWN = {
    "format": "text (default) or json",
    "try": "false: neither import packages nor start processes; answers in seconds",
}

_PACKAGE_OF = {"deepspeed": "deepspeed", "accelerate": "accelerate"}
"""Engine -> the package that it needs beyond torch."""

_SETTING_OF = {
    "wandb": "tracking=wandb",
    "tensorboard": "tracking=tensorboard",
    "peft": "adapter=lora",
}
"""Optional package -> the setting that needs it."""

_BYTES_PER_PARAMETER = 16  # fp32 weight, gradient and AdamW's two moments
_MIN_DISK_BYTES = 2 * 2**30
_MIN_SHM_BYTES = 2**30


def run(arguments: Sequence[str]) -> int:
    """Print the findings."""
    given = split("doctor", arguments, OWN)
    if given.overrides:
        from distllm.errors import ConfigError

        raise ConfigError(
            f"`{given.overrides[0]}`: `distllm doctor` takes format=json and try=false only."
        )
    found = examine(is_trying=given.own.get("try", "true").lower() != "false")
    if given.own.get("format") == "json":
        print(json.dumps(found, indent=2))
    else:
        _print(found)
    return 0 if found["healthy"] else 1


def examine(is_trying: bool = True) -> dict[str, Any]:
    """Gather everything: `versions`, `machine`, `gpus`, `collectives`, `runs`, `problems`, `advice`, `healthy`."""
    broken = checkup.import_problems() if is_trying else {}
    talks = checkup.collectives() if is_trying else {}
    problems = checkup.mismatches()
    problems += [
        f"{what} does not work: {text}" for what, (works, text) in talks.items() if not works
    ]
    gpus = checkup.gpus()
    return {
        "versions": checkup.versions(),
        "machine": checkup.machine(),
        "gpus": gpus,
        "collectives": {what: text for what, (_, text) in talks.items()},
        "runs": _runs(gpus, broken, talks),
        "problems": problems,
        "advice": _advice(broken, talks),
        "healthy": not problems,
    }


def _runs(
    gpus: list[dict[str, Any]], broken: dict[str, str], talks: dict[str, tuple[bool, str]]
) -> dict[str, str]:
    """Say of each engine and precision whether it runs here, and if not, why."""
    from distllm import registry
    from distllm.engines.hardware import available_cores

    where = f"{len(gpus)} GPUs" if gpus else f"{available_cores()} CPU cores"
    talking = all(works for works, _ in talks.values())
    found = {}
    for engine in registry.names("engine"):
        package = _PACKAGE_OF.get(engine)
        if package and not checkup.is_installed(package):
            found[f"engine={engine}"] = f"no: needs {package}"
        elif package in broken:
            found[f"engine={engine}"] = f"no: {package} cannot be imported"
        elif engine != "single" and not talking:
            found[f"engine={engine}"] = "no: processes cannot talk to each other"
        else:
            one = "one GPU" if gpus else "the CPU"
            found[f"engine={engine}"] = f"yes, on {one if engine == 'single' else where}"
    fp8 = bool(gpus) and all(gpu["fp8"] for gpu in gpus)
    found["bf16 in hardware"] = "yes" if _has_bf16(gpus) else "no: emulated, and slower than fp32"
    found["fp8 in hardware"] = "yes" if fp8 else "no: needs Ada, Hopper or newer GPUs"
    flash = checkup.is_installed("flash-attn") and "flash-attn" not in broken
    found["flash-attn"] = "yes" if flash and gpus else f"no: {'needs a GPU' if flash else 'absent'}"
    found["launchers"] = ", ".join(
        name
        for name, program in {
            "launch/torchrun.sh": "torchrun",
            "launch/deepspeed.sh": "deepspeed",
            "launch/accelerate.sh": "accelerate",
            "launch/slurm.sbatch": "sbatch",
            "launch/kubernetes.yaml": "kubectl",
        }.items()
        if shutil.which(program, path=_search_path())
    )
    return found


def _search_path() -> str:
    """Look beside this Python too: the environment need not be activated."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def _has_bf16(gpus: list[dict[str, Any]]) -> bool:
    import torch

    from distllm.engines.hardware import has_native_bf16

    if gpus:
        return all(gpu["bf16"] for gpu in gpus)
    return has_native_bf16(torch.device("cpu"))


def _advice(broken: dict[str, str], talks: dict[str, tuple[bool, str]]) -> list[str]:

    from distllm.config.plan import available_bytes
    from distllm.engines.hardware import has_native_bf16, resolve_device

    device, gpus = resolve_device("auto"), checkup.gpus()
    lines = [f"hardware.device=auto runs on {device.type}."]
    if has_native_bf16(device):
        lines.append("train.precision=auto computes in bf16, which this hardware has natively.")
    else:
        lines.append("train.precision=auto computes in fp32: bf16 is emulated here, and slower.")
    memory = sum(g["memory_gib"] for g in gpus) * 2**30 or available_bytes()
    if memory:
        lines.append(
            f"AdamW keeps {_BYTES_PER_PARAMETER} bytes per parameter, activations aside: this machine's "
            f"memory holds {memory / _BYTES_PER_PARAMETER / 1e9:.1f} billion at most. "
            "`distllm plan` tells for a given run."
        )
    lines += _advice_on_cuda(device)
    for package, error in broken.items():
        lines.append(
            f"{package} is installed and cannot be imported ({error}): it was probably built for another torch. "
            f"Type: pip install --force-reinstall --no-build-isolation {package}"
        )
    if any(not works for works, _ in talks.values()):
        lines.append(
            "Processes cannot talk to each other. This machine's name must resolve to an address of its own "
            "(`getent hosts $(hostname)`); or name the network interface: GLOO_SOCKET_IFNAME=lo on one machine, "
            "and the one that the others reach (`ip addr`) on several; the same for NCCL_SOCKET_IFNAME."
        )
    if not any(shutil.which(c) for c in checkup.COMPILERS):
        lines.append("engine.compile=true needs a C compiler on a CPU: install gcc.")
    if shutil.disk_usage(Path.cwd()).free < _MIN_DISK_BYTES:
        lines.append(
            "Less than 2 GiB of disk are free here: checkpoints may not fit. Set run.dir elsewhere."
        )
    shm = checkup.shm_bytes()
    if shm is not None and shm < _MIN_SHM_BYTES:
        lines.append(
            f"/dev/shm has {shm / 2**20:.0f} MiB, and NCCL and data loaders share memory there: start the container "
            "with --shm-size=8g (Docker) or a memory volume (launch/kubernetes.yaml)."
        )
    for package, engine in ((p, e) for e, p in _PACKAGE_OF.items()):
        if not checkup.is_installed(package):
            lines.append(f'engine={engine} needs {package}: pip install "distllm[{package}]".')
    for package, setting in _SETTING_OF.items():
        if not checkup.is_installed(package):
            lines.append(f'{setting} needs {package}: pip install "distllm[{package}]".')
    if not checkup.can_write_here():
        lines.append("This directory cannot be written to: set run.dir to one that can.")
    return lines


def _advice_on_cuda(device: Any) -> list[str]:
    import torch

    built, driver = torch.version.cuda, checkup.driver_cuda()
    if device.type == "cuda":
        if not checkup.is_installed("flash-attn"):
            return [
                'flash-attn makes attention faster on this GPU: pip install "distllm[flash]" --no-build-isolation.'
            ]
        return []
    if built and driver and _number(driver) < _number(built):
        return [
            f"torch is built for CUDA {built} and the driver runs {driver} at most: update the driver, or install "
            f"a torch for CUDA {driver}."
        ]
    if built:
        return [
            f"torch is built for CUDA {built} and sees no GPU: check the driver with nvidia-smi."
        ]
    if driver:
        return [
            f"There is an NVIDIA driver (CUDA {driver}), but torch is a build for CPUs: install one for CUDA."
        ]
    return []


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def _print(found: dict[str, Any]) -> None:
    tables = {
        "versions": found["versions"],
        "machine": found["machine"],
        "GPUs": {
            f"{i}: {g['name']}": f"{g['memory_gib']} GiB, compute capability {g['capability']}, "
            f"bf16 {'yes' if g['bf16'] else 'no'}, fp8 {'yes' if g['fp8'] else 'no'}"
            for i, g in enumerate(found["gpus"])
        },
        "processes that talk": found["collectives"],
        "what runs here": found["runs"],
    }
    width = max(len(label) for table in tables.values() for label in table)
    for title, table in tables.items():
        if table:
            print(title)
            for label, value in table.items():
                print(f"  {label:<{width}} {value}")
    for title, lines in (("problems", found["problems"]), ("what follows", found["advice"])):
        if lines:
            print(title)
            for line in lines:
                print(f"  - {line}")
