"""The frozen model that a policy is compared with: the one that training starts from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from distllm.arch.adapter import adapted, switched_off
from distllm.engines.base import Engine
from distllm.pipeline.build import Builder


def build_reference(builder: Builder, trained: Engine, make: Callable[[], Any]) -> Engine:
    """Return the engine of the reference: a model of its own, or the trained one with its adapter switched off.

    Args:
        builder: of the stage.
        trained: the engine of the model that learns.
        make: builds the reference's model, where it needs one.
    """
    if adapted(trained.model):
        return cast("Engine", WithoutAdapter(trained))
    return builder.engine("reference", make(), trained=False)


class WithoutAdapter:
    """An engine's model as it was before the adapter, with no weights of its own. It can be asked, not trained."""

    role = "reference"

    def __init__(self, engine: Engine) -> None:
        self.device, self.ranks = engine.device, engine.ranks
        self.share, self.gather = engine.share, engine.gather
        self._infer = engine.infer

    def infer(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call `function(model, *args)` as `Engine.infer` does."""
        return self._infer(_switched_off, function, *args)

    def close(self) -> None:
        """Do nothing: the weights are the trained engine's."""


def _switched_off(model: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Call the function; inside the forward of a sharded engine, so that it does not matter who holds the weights."""
    with switched_off(model):
        return function(model, *args)
