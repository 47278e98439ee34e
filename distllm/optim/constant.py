"""Constant learning rate after a linear warm-up."""

from distllm.optim.options import ScheduleOptions
from distllm.registry import register


@register("schedule")
class Constant:
    """Rise linearly over the warm-up, then stay at the peak."""

    def __init__(self, options: ScheduleOptions, max_steps: int) -> None:
        self.options, self.max_steps = options, max_steps

    def ratio(self, step: int) -> float:
        """Return the share of the peak learning rate for 0-based optimizer step `step`."""
        return self.warmup(step) * self.after(step)

    def warmup(self, step: int) -> float:
        """Return the warm-up's factor: 1/w, 2/w, ..., 1."""
        return min(1.0, (step + 1) / (self.options.warmup_steps + 1))

    def after(self, step: int) -> float:
        """Return the factor of the part that follows the warm-up."""
        return 1.0

    def fall_to_minimum(self, progress: float) -> float:
        """Map a falling `progress` in 1..0 to 1..min_lr_ratio."""
        return self.options.min_lr_ratio + (1.0 - self.options.min_lr_ratio) * progress
