"""RL of a classifier: a prompt is a text, a response is one label, an episode is one step (a contextual bandit).

The algorithms are the same as for writers: `label_join` puts the label where the classifier's verdict is read, so that
log-probabilities, entropies and values of the one "token" are found there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from distllm.errors import ConfigError
from distllm.types import Batch

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


def label_join(model: Any) -> Join:
    """Return the layout of (text, label) for a classifier.

    Raises:
        ConfigError: the verdict is read from no single position.
    """
    pooling = str(model.options.pooling)
    if pooling not in ("first", "last"):
        raise ConfigError(
            f"arch.pooling={pooling} reads a verdict from many positions at once, and a policy over labels needs one. "
            "Set arch.pooling=first."
        )

    def join(
        prompts: Sequence[Sequence[int]], labels: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        batch = model.join(prompts, [[]] * len(prompts), pad_id)
        for row, (prompt, label) in enumerate(zip(prompts, labels, strict=True)):
            place = 0 if pooling == "first" else len(prompt) - 1
            batch.labels[row, place] = label[0]
        return batch

    return join
