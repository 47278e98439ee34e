"""Half a cosine from the peak to the minimum over the whole run (arXiv 1608.03983, without restarts)."""

import math

from distllm.optim.constant import Constant
from distllm.registry import register


@register("schedule")
class Cosine(Constant):
    """Warm up, then follow half a cosine until the last step."""

    def after(self, step: int) -> float:
        span = max(1, self.max_steps - self.options.warmup_steps)
        left = min(1.0, max(0.0, (self.max_steps - step) / span))
        return self.fall_to_minimum(0.5 * (1.0 - math.cos(math.pi * left)))
