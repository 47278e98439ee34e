"""Whether a sampled response depends on what else is in its batch.

The noise is a function of seed, prompt, sample and position alone (`generation/noise.py`), so only rounding can tell batches
apart: a product of other shape may round otherwise and tip a near tie. In fp32 that is rare, in bf16 it is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from distllm.engines.base import Engine
from distllm.pipeline.build import Builder
from distllm.pipeline.measure import answer_with, heldout_prompts

NUM_COMPARED = 32
"""Prompts that are answered alone and together."""


def sampling_agreement(builder: Builder, engine: Engine) -> dict[str, float]:
    """Answer held-out prompts once in one batch and once each by itself, with equal noise. All ranks take part.

    Returns:
        `eval/agreement/tokens`: share of places at which both say the same token, of all places that either has; behind
        the first difference responses go separate ways. `eval/agreement/responses`: share of equal responses.
    """
    prompts = heldout_prompts(builder)[:NUM_COMPARED]
    options = builder.config.generation
    together, alone = (
        [
            r.response_ids
            for r in answer_with(builder, engine, prompts, options, batch_size=size).rollouts
        ]
        for size in (NUM_COMPARED, 1)
    )
    tokens, responses = equal_shares(together, alone)
    return {"eval/agreement/tokens": tokens, "eval/agreement/responses": responses}


def equal_shares(
    some: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> tuple[float, float]:
    """Return the share of places with equal tokens, and the share of equal rows."""
    places = [
        a == b for one, other in zip(some, others, strict=True) for a, b in zip_longest(one, other)
    ]
    rows = [list(one) == list(other) for one, other in zip(some, others, strict=True)]
    return sum(places) / max(len(places), 1), sum(rows) / max(len(rows), 1)
