"""The training loop and what it needs: step, state, checkpoints, evaluation. The package itself can be called."""

import sys
from types import ModuleType
from typing import Any


class _CallableModule(ModuleType):
    """Makes `distllm.train(config)` run a stage although `distllm.train` is also this package.

    Python looks a call up on the type of what is called, so the module gets a type with a `__call__`. The stage is
    imported only then: it lies in `pipeline/`, above this folder, and nothing in here may depend on it.
    """

    def __call__(self, config: Any) -> Any:
        from distllm.pipeline.stage import run_stage

        return run_stage(config)


sys.modules[__name__].__class__ = _CallableModule
