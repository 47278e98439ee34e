"""Warm-up, stable, decay: constant at the peak, then linear to the minimum (arXiv 2404.06395)."""

from distllm.optim.constant import Constant
from distllm.registry import register


@register("schedule")
class WSD(Constant):
    """Warm up, stay, and fall linearly over the last `decay_fraction` of the run."""

    def after(self, step: int) -> float:
        span = max(1.0, self.options.decay_fraction * self.max_steps)
        return self.fall_to_minimum(min(1.0, max(0.0, (self.max_steps - step) / span)))
