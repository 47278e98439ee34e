"""Settings of the engine: how the mathematics is laid out on the hardware, never what is computed."""

from dataclasses import dataclass

from distllm.types import free


@dataclass(kw_only=True, slots=True)
class EngineOptions:
    """How a model is run."""

    name: str = free("single")
    compile: bool = free(False)
    """Compile each block with torch.compile (needs a C compiler on a CPU)."""
    activation_checkpointing: str = free("none")
    """`none`; `full`: recompute each block in the backward pass, for about a third more time; `selective`: keep the
    results of matrix products and attention, and recompute what is cheap between them."""
    start_timeout_s: int = free(300)
    """Longest wait for all processes to appear at the start."""
    timeout_s: int = free(100)
    """Longest wait for the other processes within an optimizer step; longer hides a hang for longer."""
    long_timeout_s: int = free(1800)
    """The same while sampling, scoring, evaluating, saving and exporting, where one process may have more to do."""


@dataclass(frozen=True, slots=True)
class BatchSizes:
    """Sequences in one optimizer step, for libraries that want to know; ours count for themselves."""

    per_step: int = 1
    """Over all processes (`train.global_batch_size`)."""
    per_micro_step: int = 1
    """Of one process in one forward and backward (`train.micro_batch_size`)."""


@dataclass(kw_only=True, slots=True)
class HardwareOptions:
    """What the machine offers to a process."""

    name: str = free("auto")
    device: str = free("auto")
    """`auto` (cuda if there is one, else cpu), `cpu` or `cuda`."""
    threads: int = free(0)
    """CPU threads; 0 uses every core this process may run on, shared with the other processes of this machine."""
    attention: str = free("auto")
    """Attention kernel: `auto` takes the first that serves the model on this device and says why; `flash2`, `flash3`,
    `flash4`, `sdpa_flash`, `sdpa_cudnn`, `sdpa_math`, `sdpa`, `flex`, `blocked` (CPU) or `eager` force one, and one that
    cannot serve is an error. Generating token by token, which reads a cache, has a path of its own."""
    loss: str = free("chunked")
    """Kernel of the vocabulary loss: `chunked` is ours and runs everywhere; `liger` is Liger's in Triton, on a GPU where
    the package liger-kernel is installed."""
