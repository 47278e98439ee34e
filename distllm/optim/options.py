"""Settings of optimizers and learning-rate schedules."""

from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class AdamWOptions:
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101)."""

    name: str = "adamw"
    lr: float = 1e-3
    """Peak learning rate; the schedule scales it."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment; nearer to 1 averages over more steps."""
    eps: float = 1e-8
    """Added to the root of the second moment (PyTorch's form, outside the bias correction)."""
    weight_decay: float = 0.1
    """Decoupled decay of matrices; norm gains and biases are not decayed."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them alone."""


@dataclass(kw_only=True, slots=True)
class ScheduleOptions:
    """Shape of the learning rate over the run."""

    name: str = "constant"
    warmup_steps: int = 0
    """Steps of linear rise from 0 to the peak."""
    decay_fraction: float = 0.5
    """Share of the run, at its end, over which `wsd` falls linearly to its minimum."""
    min_lr_ratio: float = 0.0
    """Learning rate at the end, as a share of the peak."""
