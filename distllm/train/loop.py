"""The training loop of every stage: next micro-batches, step, log, evaluate, save, stop on a signal.

Pretraining, SFT and reward modelling differ from each other, and from RL, only in the `Source` that hands out work.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from distllm.errors import EngineError
from distllm.train.meters import Meters
from distllm.train.micro_batches import sample_ids
from distllm.train.options import TrainOptions
from distllm.train.step import StepResult, optimizer_step
from distllm.train.work import Source, Work


class NotFinite(EngineError):
    """More steps had a loss or gradient that is not finite than may be skipped. The weights are finite."""


@dataclass(slots=True)
class Loop:
    """What the loop needs; `run.state` turns it into a checkpoint and back."""

    options: TrainOptions
    stage: str
    source: Source
    log: Callable[[int, dict[str, Any]], None]
    """Write one line of metrics."""
    evaluate: Callable[[int], dict[str, float]]
    """Look at held-out data; the argument is the number of finished steps."""
    save: Callable[[Loop], None]
    stop_requested: Callable[[], bool]
    """Whether to stop before the next step; every rank gets the same answer."""
    progress: Callable[[int, dict[str, float]], None]
    """Move the progress line."""
    roll_back: Callable[[Loop], bool] = lambda loop: False
    """Put back the last checkpoint, and pass over the data since; False when that is not possible, or was tried enough."""
    step: int = 0
    """Finished optimizer steps."""
    num_skipped: int = 0
    num_rollbacks: int = 0
    meters: Meters = field(default_factory=Meters)

    def run(self) -> bool:
        """Train up to `max_steps`; return False when a signal stopped it first. Always leaves a checkpoint."""
        options = self.options
        while self.step < options.max_steps and not self.stop_requested():
            started = time.monotonic()
            handed, tokens = self.source.next(self.step), 0
            if handed is None:
                break
            (work, metrics), handed_at = handed, time.monotonic()
            try:
                for part in work:
                    lr = part.lr * part.schedule.ratio(self.step)
                    result = optimizer_step(part.engine, part.objective, part.micro_batches, lr)
                    self._guard(part, result)
                    metrics |= self._named(part, result)
                    tokens = tokens or result.num_tokens
            except NotFinite:
                if not self.roll_back(self):
                    raise
                continue
            self.step += 1
            metrics["time/update_s"] = time.monotonic() - handed_at
            self.meters.add(metrics, work, tokens, time.monotonic() - started)
            self.progress(self.step, metrics)
            if self.step % options.log_every_steps == 0 or self.step == options.max_steps:
                self.log(self.step, {"stage": self.stage, **self.meters.flush()})
            if options.eval_every_steps and self.step % options.eval_every_steps == 0:
                self.log(self.step, {"stage": self.stage, **self.evaluate(self.step)})
            if self.step % options.save_every_steps == 0 and self.step < options.max_steps:
                self.save(self)

        self.save(self)
        return self.step >= options.max_steps

    def _guard(self, part: Work, result: StepResult) -> None:
        """Count a skipped step, and stop when there are too many."""
        self.num_skipped += result.skipped
        if result.skipped and self.num_skipped > self.options.max_skipped_steps:
            raise NotFinite(
                f"Step {self.step + 1} of the {part.engine.role}: non-finite loss ({result.loss}) or gradient on "
                f"samples {sample_ids(part.micro_batches)[:32]}; the weights were not touched. {self.num_skipped} "
                f"steps were skipped and train.max_skipped_steps={self.options.max_skipped_steps}. Look at these "
                "samples, lower optim.lr, or raise train.max_skipped_steps or train.max_rollbacks."
            )

    def _named(self, part: Work, result: StepResult) -> dict[str, float]:
        """Prefix a step's numbers: `train/` for the only or policy engine, `<role>/` for others."""
        prefix = "train" if part.engine.role in ("model", "policy") else part.engine.role
        named = {f"{prefix}/loss": result.loss, f"{prefix}/grad_norm": result.grad_norm}
        named[f"{prefix}/lr"] = part.lr * part.schedule.ratio(self.step)
        for key, value in result.metrics.items():
            named[key if "/" in key else f"{prefix}/{key}"] = value
        return named | part.derive(named)
