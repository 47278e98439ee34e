"""Which attention kernels there are, what each can serve, and which one a model gets.

The calls themselves are in `attention.py`, `pieces.py` and `flex_attention.py`. Kernels read who sees whom in one of three
forms: a bias added to the scores, pieces (documents laid end to end), or a block mask.

Reference: Dao 2023, arXiv 2307.08691 (flash2); Shah et al. 2024, arXiv 2407.08608 (flash3); Dong et al. 2024,
arXiv 2412.05496 (flex).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from distllm.errors import ConfigError

AUTO = "auto"
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a model asks of its attention kernel."""

    device: torch.device
    dtype: torch.dtype
    """Of queries, keys and values."""
    d_head: int
    trains: bool = False
    bias: bool = False
    """A learned bias is added to the scores (T5)."""
    softcap: bool = False
    """Scores are squashed (Gemma 2)."""
    sinks: bool = False
    """One more logit per head takes part in the softmax (GPT-OSS)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One implementation and its limits on a GPU; what holds on a CPU is in `cpu`."""

    words: str
    package: str | None = None
    """Module that has to be installed."""
    cpu: bool = False
    cuda: bool = True
    half_only: bool = False
    """Takes bfloat16 and float16 alone."""
    largest_head: int | None = None
    capability: tuple[int, ...] = ()
    """Major compute capabilities of the GPUs it is written for; () = all."""
    takes: frozenset[str] = frozenset()
    """Of `bias`, `bias gradient`, `softcap`, `sinks`."""
    reads: str = "bias"
    """`bias`, `pieces` or `block_mask`, on a GPU."""


def _takes(words: str) -> frozenset[str]:
    return frozenset(word.strip() for word in words.split(","))


_SINCE_AMPERE = (8, 9, 10, 11, 12)
KERNELS: dict[str, Kernel] = {
    "flash3": Kernel(words="flash-attn 3, variable lengths", package="flash_attn_interface", half_only=True,
                     largest_head=256, capability=(9,), takes=_takes("softcap"), reads="pieces"),
    "flash4": Kernel(words="flash-attn 4, variable lengths", package="flash_attn.cute", half_only=True,
                     largest_head=128, capability=(9, 10), reads="pieces"),
    "flash2": Kernel(words="flash-attn 2, variable lengths", package="flash_attn.flash_attn_interface", half_only=True,
                     largest_head=256, capability=_SINCE_AMPERE, takes=_takes("softcap"), reads="pieces"),
    "sdpa_flash": Kernel(words="torch's flash kernel", cpu=True, half_only=True, largest_head=256,
                         capability=_SINCE_AMPERE, reads="pieces"),
    "flex": Kernel(words="FlexAttention", cpu=True, takes=_takes("bias, bias gradient, softcap, sinks"),
                   reads="block_mask"),
    "sdpa": Kernel(words="torch's scaled_dot_product_attention, which picks a kernel itself", cpu=True,
                   takes=_takes("bias, bias gradient")),
    "sdpa_cudnn": Kernel(words="torch's cuDNN kernel", half_only=True, largest_head=128, capability=_SINCE_AMPERE,
                         takes=_takes("bias")),
    "sdpa_math": Kernel(words="torch's matrix products", cpu=True, takes=_takes("bias, bias gradient")),
    "blocked": Kernel(words="our matrix products in blocks of queries where attention is causal and at most 1,024 "
                            "tokens long, torch's kernel elsewhere",
                      cpu=True, cuda=False, takes=_takes("bias, bias gradient")),
    "eager": Kernel(words="our written-out softmax", cpu=True, takes=_takes("bias, bias gradient, softcap, sinks")),
}  # fmt: skip
"""Name -> kernel, in the order in which `auto` asks on a GPU."""
_CPU_ORDER = ("blocked", "eager")


@dataclass(frozen=True, slots=True)
class Choice:
    """The kernel that a model got."""

    name: str
    reason: str


def choose(name: str, need: Need) -> Choice:
    """Pick the kernel called `name`, or, for `auto`, the first that serves.

    Raises:
        ConfigError: there is none of that name, or it cannot serve; the message names those that can.
    """
    if name != AUTO and name not in KERNELS:
        raise ConfigError(
            f"hardware.attention={name} is unknown. Known: {', '.join((AUTO, *KERNELS))}."
        )
    if name != AUTO:
        reason = refusal(name, need)
        if reason is not None:
            able = [other for other in KERNELS if refusal(other, need) is None]
            raise ConfigError(
                f"hardware.attention={name} ({KERNELS[name].words}) cannot serve here: {reason}. "
                f"What can: {', '.join(able)}. Set hardware.attention={able[0]} or auto."
            )
        return Choice(name, f"{KERNELS[name].words}; hardware.attention asks for it")
    skipped = []
    for other in KERNELS if need.device.type == "cuda" else _CPU_ORDER:
        reason = refusal(other, need)
        if reason is None:
            why = "; ".join(skipped) or "the first choice on this device"
            return Choice(other, f"{KERNELS[other].words} ({why})")
        skipped.append(f"no {other}: {reason}")
    raise AssertionError("eager serves everything")


def refusal(name: str, need: Need) -> str | None:
    """Say why the kernel cannot serve `need`; None = it can."""
    kernel, on_cuda = KERNELS[name], need.device.type == "cuda"
    if not (kernel.cuda if on_cuda else kernel.cpu):
        return f"it runs on a {'CPU' if on_cuda else 'GPU'} alone, and the device is {need.device.type}"
    # A package is looked for before anything that only matters where it is installed.
    if kernel.package is not None and not _installed(kernel.package):
        return f"the package {kernel.package.split('.')[0]} with {kernel.package} is not installed"
    if name == "flex" and not on_cuda and need.trains:
        return "FlexAttention has no backward on a CPU"
    limits = _gpu_limits(kernel, need) if on_cuda else None
    if limits is None:
        limits = _unserved(kernel, need, on_cuda and name == "sdpa_flash")
    return limits


def reads(name: str, device: torch.device) -> str:
    """Return in which form a kernel is told who sees whom: `bias`, `pieces` or `block_mask`."""
    if name == AUTO or (name == "sdpa_flash" and device.type != "cuda"):
        return "bias"
    return KERNELS[name].reads


def _gpu_limits(kernel: Kernel, need: Need) -> str | None:
    major = _capability(need.device)
    if kernel.capability and major not in kernel.capability:
        known = ", ".join(f"{c}.x" for c in kernel.capability)
        return f"it is written for compute capability {known}, and this GPU has {major}.x"
    if kernel.half_only and need.dtype not in _HALF:
        kind = str(need.dtype).removeprefix("torch.")
        return f"it computes in bfloat16 or float16, and train.precision makes queries {kind} (set it to bf16)"
    if kernel.largest_head is not None and need.d_head > kernel.largest_head:
        return f"head size {need.d_head} is above its limit of {kernel.largest_head}"
    if kernel.largest_head is not None and need.d_head % 8:
        return f"head size {need.d_head} is not a multiple of 8"
    return None


def _unserved(kernel: Kernel, need: Need, is_varlen: bool) -> str | None:
    asks: dict[str, tuple[bool, str]] = {
        "bias": (need.bias, "it takes no learned bias on the scores (relative positions)"),
        "bias gradient": (need.bias and need.trains, "it gives a learned bias no gradient"),
        "softcap": (need.softcap, "it has no soft-cap of the scores"),
        "sinks": (need.sinks, "it has no sink logits"),
    }
    for what, (asked, words) in asks.items():
        if asked and what not in kernel.takes:
            return words
    if is_varlen and not _has_varlen():
        return "this torch has no variable-length kernel with windows (needs 2.13)"
    return None


def _capability(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0]


def _has_varlen() -> bool:
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return "window_size" in inspect.signature(varlen_attn).parameters


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # a parent package is missing, or breaks when it is imported
        return False
