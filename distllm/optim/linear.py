"""Linear fall from the peak to the minimum over the whole run."""

from distllm.optim.constant import Constant
from distllm.registry import register


@register("schedule")
class Linear(Constant):
    """Warm up, then fall linearly until the last step."""

    def after(self, step: int) -> float:
        span = max(1, self.max_steps - self.options.warmup_steps)
        return self.fall_to_minimum(min(1.0, max(0.0, (self.max_steps - step) / span)))
