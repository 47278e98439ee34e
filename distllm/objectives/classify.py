"""Classification: which class a text, or a pair of texts, belongs to. Where the text is read is the head's business."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.data.labelled import LabelledExample
from distllm.registry import register
from distllm.types import Batch, LossOutput, Model

Join = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]], int], Batch]


@dataclass(kw_only=True, slots=True)
class ClassifyOptions:
    """Learn to tell classes of texts apart."""

    name: str = "classify"
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes."""


@register("objective")
class Classify:
    """Cross-entropy in nats, summed over texts; weight: their number."""

    Options = ClassifyOptions
    records = "labelled"
    coefficients: Mapping[str, float] = {"label": 1.0}

    def __init__(self, options: ClassifyOptions, pad_id: int, join: Join) -> None:
        self.options, self.pad_id, self.join = options, pad_id, join

    def collate(self, examples: Sequence[LabelledExample]) -> Batch:
        """Lay out the texts; a second one is where a response would be."""
        batch = self.join(
            [e.first_ids for e in examples], [e.second_ids for e in examples], self.pad_id
        )
        batch.labels = None
        batch.classes = torch.tensor([e.label for e in examples])
        batch.sample_ids = torch.tensor([e.sample_id for e in examples])
        return batch

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Count the texts."""
        return {"label": torch.tensor(float(len(batch.input_ids)), dtype=torch.float64)}

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Compare the verdicts with the classes."""
        assert batch.classes is not None
        logits = class_logits(model, batch).float()
        loss = F.cross_entropy(
            logits, batch.classes, reduction="sum", label_smoothing=self.options.label_smoothing
        )
        right = (logits.argmax(dim=-1) == batch.classes).double().sum()
        count = torch.tensor(float(len(logits)), dtype=torch.float64)
        return LossOutput({"label": loss}, {"accuracy": (right.detach(), count)})


def class_logits(model: Model, batch: Batch) -> Tensor:
    """Return one logit per class and text, [batch, num_labels]."""
    out = model(**batch.inputs(), compute_logits=False)
    return model.head.logits(out.last_hidden_state, batch.output_mask)
