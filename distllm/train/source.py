"""The source of supervised stages: samples of a data set in the sampler's order, cut into micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from distllm.data.mixture import make_sampler
from distllm.data.sampler import Samples
from distllm.engines.base import Engine
from distllm.engines.collectives import together
from distllm.optim.constant import Constant
from distllm.train.ledger import Ledger
from distllm.train.options import TrainOptions
from distllm.train.work import Work
from distllm.types import Objective


class SampleSource:
    """Hands out `global_batch_size` samples a step, each process its share of every global batch."""

    def __init__(
        self,
        dataset: Samples[Any],
        engine: Engine,
        objective: Objective,
        schedule: Constant,
        lr: float,
        options: TrainOptions,
        seed: int,
        reference: Engine | None = None,
    ) -> None:
        self.dataset, self.engine, self.objective = dataset, engine, objective
        self.schedule, self.lr, self.options = schedule, lr, options
        self.sampler = make_sampler(dataset, seed, shuffle=options.shuffle)
        self.ledger = Ledger()
        self.reference = reference
        """A frozen model that the objective's `prepare` asks."""

    def next(self, step: int) -> tuple[list[Work], dict[str, float]]:
        """Return the work of 0-based `step`."""
        ids = self.ledger.take(self.sampler, self.options.global_batch_size)
        ranks = self.engine.ranks
        first = self.ledger.position - len(ids)
        mine = list(enumerate(ids, start=first))[ranks.dp_rank :: ranks.dp_size]
        size = self.options.micro_batch_size
        examples = together(lambda: _groups(_fetch(self.dataset, mine), size, self.dataset))
        batches = together(lambda: [self.objective.collate(group) for group in examples])
        prepare = getattr(self.objective, "prepare", None)
        metrics = prepare(self.engine, self.reference, examples, batches) if prepare else {}
        work = Work(self.engine, self.objective, batches, self.schedule, self.lr)
        metrics["data/epoch"] = self.ledger.position / self.sampler.num_samples
        return [work], metrics

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the position in the data."""
        return {}, self.ledger.state()

    def load_state(self, tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what `state` returned."""
        self.ledger.load_state(state)

    def pass_over(self, state: dict[str, Any]) -> None:
        """Go on behind the samples that had been handed out when `state` was taken."""
        self.ledger.pass_over(self.sampler, state["position"])


def _groups(examples: list[Any], size: int, dataset: Any) -> list[list[Any]]:
    """Cut a step's samples into micro-batches of `size`.

    Where the data set tells lengths, samples of like length go together, the longest first, so that few places are padding. The
    step's gradient does not depend on the cut (`step.py`).
    """
    if hasattr(dataset, "length"):
        examples = sorted(examples, key=dataset.length, reverse=True)
    return [examples[start : start + size] for start in range(0, len(examples), size)]


def _fetch(dataset: Any, places: Sequence[tuple[int, int]]) -> list[Any]:
    """Look samples up by (position in the run, number); a data set that draws noise is told the position."""
    found = []
    for position, number in places:
        try:
            has_noise = hasattr(dataset, "draw")
            found.append(dataset.draw(number, position) if has_noise else dataset[number])
        except Exception as error:
            error.add_note(f"That was sample {number} of the training data.")
            raise
    return found
