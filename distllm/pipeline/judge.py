"""What `distllm evaluate` tells of a reward model beyond its accuracy: calibration bin by bin, and whether a score depends
on anything but the answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from distllm.data.datasets import PairExample
from distllm.engines.base import Engine
from distllm.objectives.reward import Reward, score
from distllm.train.evaluate import pair_scores, surety
from distllm.train.intervals import reliability
from distllm.types import IGNORE_INDEX, Batch

NUM_COMPARED = 64
"""Pairs whose scores are compared under other layouts."""
EXTRA_PADDING = 16


def judge(
    engine: Engine, objective: Reward, pairs: Sequence[PairExample], batch_size: int
) -> dict[str, Any]:
    """Measure calibration and the agreement of scores under other layouts. All ranks take part.

    Returns:
        `reliability` (a list of bins), and per layout `agreement/NAME` (share of pairs of which the same answer is
        preferred) and `gap/NAME` (largest difference of a score, in units of the scores' spread).
    """
    chosen, rejected = pair_scores(engine, objective, pairs, batch_size)
    scale = engine.model.head.reward_std.item()  # type: ignore[union-attr]
    bins = reliability(*surety(chosen - rejected, scale))
    found: dict[str, Any] = {"eval/reliability": [asdict(b) for b in bins]}
    some = pairs[:NUM_COMPARED]
    usual = torch.stack([chosen[: len(some)], rejected[: len(some)]])
    spread = usual.std().item() or 1.0
    layouts: dict[str, tuple[int, Callable[[Batch, int], Batch]]] = {
        "batch_of_one": (1, lambda batch, pad: batch),
        "more_padding": (batch_size, pad_right),
        "left_padding": (batch_size, pad_left),
    }
    for name, (size, change) in layouts.items():
        rows: dict[int, Tensor] = {}
        for numbers, counts in engine.share(len(some), size):
            batch = change(objective.collate([some[i] for i in numbers]), objective.pad_id)
            both = engine.infer(score, batch.to(engine.device)).double().cpu().view(2, -1)
            rows |= zip(numbers, both.unbind(dim=1), strict=True) if counts else {}
        other = torch.stack(engine.gather(rows, len(some)), dim=1)
        same = torch.sign(other[0] - other[1]) == torch.sign(usual[0] - usual[1])
        found[f"eval/agreement/{name}"] = same.double().mean().item()
        found[f"eval/gap/{name}"] = (other - usual).abs().max().item() / spread
    return found


def pad_right(batch: Batch, pad_id: int) -> Batch:
    """Add columns of padding on the right."""
    return _rearranged(
        batch, lambda x, fill: torch.nn.functional.pad(x, (0, EXTRA_PADDING), value=fill), pad_id
    )


def pad_left(batch: Batch, pad_id: int) -> Batch:
    """Move the padding of each row to its left."""
    mask = batch.attention_mask
    assert mask is not None
    # Rows are padded on one side, so a row's real tokens keep their order under a rotation.
    last = torch.where(mask, torch.arange(mask.shape[1]), 0).amax(dim=1)
    columns = (torch.arange(mask.shape[1]) + 1 + last[:, None]) % mask.shape[1]
    return _rearranged(batch, lambda x, fill: x.gather(1, columns), pad_id)


def _rearranged(batch: Batch, change: Callable[[Tensor, Any], Tensor], pad_id: int) -> Batch:
    """Apply `change` to what runs along the sequence; an encoder's targets stay as they are."""
    fills = {"input_ids": pad_id, "attention_mask": False, "token_type_ids": 0}
    if batch.decoder_input_ids is None:
        fills["labels"] = IGNORE_INDEX
    names = [name for name in fills if getattr(batch, name) is not None]
    for name in names:
        setattr(batch, name, change(getattr(batch, name), fills[name]))
    return batch
