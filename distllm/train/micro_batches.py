"""What a step says about the micro-batches it learned from: tokens, samples."""

from collections.abc import Sequence

import torch

from distllm.types import Batch


def num_tokens(batch: Batch) -> int:
    """Count the tokens of a batch that are not padding."""
    for mask in (batch.attention_mask, batch.segment_ids):
        if mask is not None:
            return int((mask != 0).sum())
    return batch.input_ids.numel()


def sample_ids(micro_batches: Sequence[Batch]) -> list[int]:
    """List the data-set samples in `micro_batches`."""
    known = [b.sample_ids for b in micro_batches if b.sample_ids is not None]
    return torch.cat(known).tolist() if known else []
