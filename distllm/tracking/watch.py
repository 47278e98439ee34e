"""Between the loop and the trackers: prints a line of RL numbers now and then, and advice when a threshold is crossed."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from pathlib import Path

from distllm.tracking.advice import Advisor
from distllm.tracking.base import Tracker
from distllm.tracking.lines import numbers, read_jsonl

LINE_EVERY_S = 10.0
"""Least time between two lines of numbers."""

_log = logging.getLogger("distllm")


class Watch:
    """Logs to the trackers, and tells the terminal of the main process what stands in each row."""

    def __init__(self, tracker: Tracker, *, is_main: bool, max_steps: int) -> None:
        """Start without a past.

        Args:
            tracker: where every row goes.
            is_main: False says nothing (ranks other than the main one).
            max_steps: the last step, whose numbers are shown in any case.
        """
        self.tracker, self.is_main, self.max_steps = tracker, is_main, max_steps
        self.advisor = Advisor()
        self._shown_at = float("-inf")

    def recall(self, metrics: Path) -> None:
        """Take in what the run logged before it was interrupted; it has been said then."""
        for row in read_jsonl(metrics):
            self.advisor.look(0, row)

    def log(self, step: int, metrics: Mapping[str, float | str]) -> None:
        """Record one row of metrics."""
        self.tracker.log(step, metrics)
        if not self.is_main:
            return
        due = time.monotonic() - self._shown_at >= LINE_EVERY_S or step == self.max_steps
        if "rl/reward_mean" in metrics and due:
            self._shown_at = time.monotonic()
            _log.info("step %d  %s", step, describe(metrics))
        for advice in self.advisor.look(step, metrics):
            say = _log.info if advice.level == "note" else _log.warning
            say("step %d: %s", step, advice.text)


PARTS = (
    ("reward", "{rl/reward_mean:.3f} ± {rl/reward_std:.3f}"),
    ("KL", "{rl/kl_ref:.3f}"),
    ("per token k1", "{rl/kl_k1:.4f}"),
    ("k2", "{rl/kl_k2:.4f}"),
    ("k3", "{rl/kl_k3:.4f}"),
    ("entropy", "{rl/entropy:.3f}"),
    ("clipped low", "{rl/clip_low:.1%}"),
    ("high", "{rl/clip_high:.1%}"),
    ("explained variance", "{rl/explained_variance:.2f}"),
    ("length", "{rl/response_length:.1f}"),
    ("truncated", "{rl/truncated:.0%}"),
    ("groups without spread", "{rl/zero_spread:.0%}"),
    ("effective samples", "{rl/effective_sample_size:.0%}"),
    ("sampler off by", "{rl/sampler_mismatch:.1e}"),
    ("sample", "{time/sample_s:.2f} s"),
    ("reward", "{time/reward_s:.2f} s"),
    ("prepare", "{time/prepare_s:.2f} s"),
    ("update", "{time/update_s:.2f} s"),
)
"""(label, how its metrics are written); a part whose metrics were not logged is left out."""


def describe(metrics: Mapping[str, object]) -> str:
    """Write one row of RL metrics for people."""
    known, shown = numbers(metrics), []
    for label, form in PARTS:
        try:
            shown.append(f"{label} {form.format_map(known)}")
        except KeyError:
            continue
    return " · ".join(shown)
