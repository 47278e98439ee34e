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


def filling(batch: Batch) -> tuple[int, int, int, int]:
    """Count the places of a batch's rectangles, those that hold a token, its rows, and the documents in them.

    A decoder's rectangle counts beside its encoder's; the rows and documents are the encoder's.
    """
    places, filled = batch.input_ids.numel(), num_tokens(batch)
    if batch.decoder_input_ids is not None:
        places += batch.decoder_input_ids.numel()
        masks = (batch.decoder_attention_mask, batch.decoder_segment_ids)
        known = next((m for m in masks if m is not None), None)
        filled += batch.decoder_input_ids.numel() if known is None else int((known != 0).sum())
    rows = documents = batch.input_ids.shape[0]
    if batch.segment_ids is not None:
        documents = int(batch.segment_ids.amax(dim=1).sum())
    return places, filled, rows, documents


def sample_ids(micro_batches: Sequence[Batch]) -> list[int]:
    """List the data-set samples in `micro_batches`."""
    known = [b.sample_ids for b in micro_batches if b.sample_ids is not None]
    return torch.cat(known).tolist() if known else []
