"""Confidence intervals and calibration of what evaluations report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

Z_95 = NormalDist().inv_cdf(0.975)


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a proportion (Wilson 1927)."""
    if count == 0:
        return 0.0, 1.0
    p, z2 = successes / count, Z_95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z_95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return centre - half, centre + half


def paired_interval(before: Sequence[float], after: Sequence[float]) -> tuple[float, float, float]:
    """Return mean, lower and upper end (95%, normal) of the paired differences after - before; NaN pairs are left out."""
    differences = [b - a for a, b in zip(before, after, strict=True) if math.isfinite(b - a)]
    mean = fmean(differences or [0.0])
    half = (
        Z_95 * stdev(differences) / math.sqrt(len(differences))
        if len(differences) > 1
        else math.inf
    )
    return mean, mean - half, mean + half


@dataclass(frozen=True, slots=True)
class Bin:
    """Predictions of similar confidence."""

    low: float
    high: float
    confidence: float
    """Their mean."""
    accuracy: float
    """Share of them that are right."""
    count: int


def reliability(
    confidences: Sequence[float], outcomes: Sequence[bool], num_bins: int = 10
) -> list[Bin]:
    """Return the non-empty ones of `num_bins` bins of equal width over [0, 1]."""
    members: list[list[int]] = [[] for _ in range(num_bins)]
    for index, confidence in enumerate(confidences):
        members[min(num_bins - 1, int(confidence * num_bins))].append(index)
    return [
        Bin(
            low=number / num_bins,
            high=(number + 1) / num_bins,
            confidence=fmean(confidences[i] for i in inside),
            accuracy=fmean(float(outcomes[i]) for i in inside),
            count=len(inside),
        )
        for number, inside in enumerate(members)
        if inside
    ]


def expected_calibration_error(
    confidences: Sequence[float], outcomes: Sequence[bool], num_bins: int = 10
) -> float:
    """Return the mean gap between confidence and accuracy over equal-width bins (Guo et al. 2017, arXiv 1706.04599)."""
    bins = reliability(confidences, outcomes, num_bins)
    return sum(b.count * abs(b.confidence - b.accuracy) for b in bins) / len(confidences)


def slope_through_origin(x: Sequence[float], y: Sequence[float]) -> tuple[float, float, float]:
    """Return the slope b of y = b x by least squares with its 95% interval; x must not be 0 throughout.

    The interval allows for errors whose size depends on x (White 1980).
    """
    total = sum(a * a for a in x)
    slope = sum(a * b for a, b in zip(x, y, strict=True)) / total
    errors = sum((a * (b - slope * a)) ** 2 for a, b in zip(x, y, strict=True))
    half = Z_95 * math.sqrt(errors) / total
    return slope, slope - half, slope + half


def area_under_roc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Return the chance that a positive scores above a negative, ties counting half (Mann and Whitney 1947)."""
    order = sorted(range(len(scores)), key=scores.__getitem__)
    ranks = [0.0] * len(scores)
    start = 0
    while start < len(order):
        end = start
        while end < len(order) and scores[order[end]] == scores[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    count = sum(positive)
    total = sum(rank for rank, is_positive in zip(ranks, positive, strict=True) if is_positive)
    return (total - count * (count + 1) / 2) / (count * (len(scores) - count))
