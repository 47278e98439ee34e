"""The reliability plot of a reward model: how often it is right, against how sure it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw_reliability(bins: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw bins of `low`, `high`, `confidence`, `accuracy`, `count` to an image; its ending decides the format.

    A calibrated model lies on the diagonal; the bars at the foot say how many predictions a bin holds.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    start = min((b["low"] for b in bins), default=0.5)
    axes.plot([start, 1], [start, 1], color="0.6", linestyle="--", linewidth=1, label="calibrated")
    total = sum(b["count"] for b in bins) or 1
    axes.bar(
        [b["low"] for b in bins],
        [0.15 * (1 - start) * b["count"] / total for b in bins],
        [b["high"] - b["low"] for b in bins],
        bottom=start,
        align="edge",
        color="0.85",
        label="share of pairs",
    )
    sure, right = ([b[key] for b in bins] for key in ("confidence", "accuracy"))
    axes.plot(sure, right, marker="o", label="reward model")
    for b in bins:
        axes.annotate(
            f"{b['count']}",
            (b["confidence"], b["accuracy"]),
            textcoords="offset points",
            xytext=(0, 6),
            ha="center",
            fontsize=7,
        )
    axes.set_xlim(start, 1)
    axes.set_ylim(min([start, *right]), 1.02)
    axes.set_xlabel("probability given to the preferred answer")
    axes.set_ylabel("share of these that are right")
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
