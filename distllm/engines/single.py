"""One process on a CPU or one GPU: the reference that every other engine is held against."""

from distllm.engines.native import NativeEngine
from distllm.registry import register


@register("engine")
class Single(NativeEngine):
    """Engine without any communication."""

    needs_group = False
