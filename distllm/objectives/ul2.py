"""UL2's mixture of denoisers: each piece is corrupted in one of seven ways and says which kind by its first token.

    R  short spans, little noise: (mean 3, 15%), (8, 15%)                               [NLU]
    S  the last quarter, in order                                                       [S2S]
    X  long spans or much noise: (3, 50%), (8, 50%), (64, 15%), (64, 50%)               [NLG]

Reference: Tay et al. 2023, arXiv 2205.05131, section 3.1. All seven are equally likely.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from distllm.objectives.span import Pair, Span, noise_counts, random_spans
from distllm.registry import register


@dataclass(frozen=True, slots=True)
class Denoiser:
    """One way to corrupt."""

    mode: str
    rate: float
    mean_length: float
    """0 hides the end of the piece as one span."""


DENOISERS = (
    Denoiser("[NLU]", 0.15, 3.0),
    Denoiser("[NLU]", 0.15, 8.0),
    Denoiser("[S2S]", 0.25, 0.0),
    Denoiser("[NLG]", 0.5, 3.0),
    Denoiser("[NLG]", 0.5, 8.0),
    Denoiser("[NLG]", 0.15, 64.0),
    Denoiser("[NLG]", 0.5, 64.0),
)


@register("objective")
class UL2(Span):
    """Reads z_loss; rates and lengths are the recipe's own."""

    @functools.cached_property
    def _mode_ids(self) -> dict[str, list[int]]:
        return {d.mode: self.vocabulary.encode(d.mode) for d in DENOISERS}

    def sizes(self, num_tokens: int) -> tuple[int, ...]:
        """Count the most that any of the denoisers makes of a piece."""
        modes = max(map(len, self._mode_ids.values()))
        sides = [self._sizes_of(num_tokens, d.rate, d.mean_length or num_tokens) for d in DENOISERS]
        return max(s for s, _ in sides) + modes, max(t for _, t in sides)

    def corrupt(self, ids: np.ndarray, rng: np.random.Generator) -> Pair:
        """Draw a denoiser, then the spans."""
        denoiser = DENOISERS[int(rng.random() * len(DENOISERS))]
        noise, count = noise_counts(len(ids), denoiser.rate, denoiser.mean_length or len(ids))
        if denoiser.mean_length:
            spans = random_spans(rng, len(ids), noise, count)
        else:
            spans = np.array([[len(ids) - noise, len(ids)]])
        inputs, targets = self._hide(ids, spans)
        return np.concatenate([self._mode_ids[denoiser.mode], inputs]), targets
