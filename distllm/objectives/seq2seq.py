"""Fine-tuning of models that read a source and write a target apart from it: the last answer of a dialogue, given what
came before.

What is a source and a target to the model is `model.join`'s business: two sequences for an encoder-decoder, parts A and B
for GLM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from distllm.data.datasets import ChatExample
from distllm.errors import DataError
from distllm.objectives.sft import SFT, SFTOptions
from distllm.registry import register
from distllm.types import Batch

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


@register("objective")
class Seq2Seq(SFT):
    """Sum of the negative log-probabilities of the target's tokens, in nats; weight: their number."""

    Options = SFTOptions
    records = ""  # chosen by `stage=sft` where the architecture asks for it; no stage of its own

    def __init__(self, options: SFTOptions, pad_id: int, join: Join, longest_row: int = 0) -> None:
        super().__init__(options, pad_id, longest_row)
        self.join = join

    def padded(self, examples: Sequence[ChatExample]) -> Batch:
        """Cut each dialogue before its last learned answer."""
        cuts = [last_answer(e) for e in examples]
        sources = [e.input_ids[:start] for e, (start, _) in zip(examples, cuts, strict=True)]
        targets = [e.input_ids[start:stop] for e, (start, stop) in zip(examples, cuts, strict=True)]
        return self.join(sources, targets, self.pad_id)


def last_answer(example: ChatExample) -> tuple[int, int]:
    """Return where the last run of learned tokens starts and stops.

    Raises:
        DataError: nothing is learned, or nothing comes before it.
    """
    stop = len(example.mask)
    while stop and not example.mask[stop - 1]:
        stop -= 1
    start = stop
    while start and example.mask[start - 1]:
        start -= 1
    if start == 0:
        raise DataError(
            f"dialogue {example.sample_id} begins with what is to be learned, so there is no source for it."
        )
    return start, stop
