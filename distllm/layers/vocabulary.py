"""Where the output matrix lies: whole on this process, or in parts on several, each with rows of its own.

An engine that cuts the matrix registers how its kind of tensor answers; the functions of `cross_entropy.py` and the head
ask here. No process is known in this folder.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class SplitMatrix(Protocol):
    """What can be asked of a matrix [vocab, d_model] that lies in parts. Arguments as in `cross_entropy.py`."""

    def loss(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, z_loss: float
    ) -> tuple[Tensor, Tensor]:
        """Answer `linear_cross_entropy_z`."""
        ...

    def logprobs(
        self, hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        """Answer `linear_logprobs`."""
        ...

    def whole(self, weight: Tensor) -> Tensor:
        """Bring the rows together, with a gradient."""
        ...


_kinds: dict[type, SplitMatrix] = {}


def register_split(kind: type, answers: SplitMatrix) -> None:
    """Let tensors of the type `kind` be answered for by `answers`."""
    _kinds[kind] = answers


def split_of(weight: Tensor) -> SplitMatrix | None:
    """Return who answers for `weight`; None for an ordinary tensor."""
    return _kinds.get(type(weight))


def whole(weight: Tensor) -> Tensor:
    """Return `weight` in full shape."""
    split = split_of(weight)
    return weight if split is None else split.whole(weight)
