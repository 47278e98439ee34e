"""Machines that a run is planned for: how many GPUs, what each holds and computes, how fast they reach each other.

Plain data, filled from `conf/hardware/`; what follows from it is worked out in `config/`.
"""

from dataclasses import dataclass

from distllm.engines.options import HardwareOptions
from distllm.types import free


@dataclass(kw_only=True, slots=True)
class ClusterOptions(HardwareOptions):
    """GPUs in equal machines (nodes). Rates count one GPU and one direction; G and T are powers of ten."""

    name: str = free("cluster")
    gpu: str = free("")
    """What the GPU is called; the numbers below are what counts."""
    num_gpus: int = free(8)
    """GPUs in all: one process each."""
    gpus_per_node: int = free(8)
    """GPUs of one machine, reached at `node_gb_per_s`."""
    memory_gib: float = free(0.0)
    """Memory of one GPU as torch reports it, in GiB of 2^30 bytes."""
    reserve_gib: float = free(4.0)
    """Memory that no tensor gets: CUDA context, communication library, gaps between blocks of the allocator."""
    memory_gb_per_s: float = free(0.0)
    """Bandwidth between a GPU and its own memory."""
    node_gb_per_s: float = free(0.0)
    """Bandwidth to the GPUs of the same machine."""
    network_gb_per_s: float = free(0.0)
    """Bandwidth to other machines."""
    node_latency_us: float = free(3.0)
    """Time of one hop of a collective inside a machine."""
    network_latency_us: float = free(10.0)
    """Time of one hop of a collective between machines."""
    peak_bf16_tflops: float = free(0.0)
    """Dense bf16 matrix products at the datasheet's rate; a rate with sparsity, twice as high, would halve every MFU."""
    peak_fp8_tflops: float = free(0.0)
    """The same in fp8."""
    peak_fp32_tflops: float = free(0.0)
    """The same in fp32 without reduced-precision products."""

    @property
    def num_nodes(self) -> int:
        """Machines, the last one perhaps not full."""
        return -(-self.num_gpus // self.gpus_per_node)
