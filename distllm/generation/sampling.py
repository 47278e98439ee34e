"""From logits to a token and its log-probability, for all rows at once. Noise is in `noise.py`."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from distllm.generation.options import GenerationOptions
from distllm.layers.precision import wide

_BLOCK = 64  # tokens per block in the two-level search of `_invert_cdf`


def pick(
    logits: Tensor, uniforms: Tensor, options: GenerationOptions, seen: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw one token per row.

    Order: repetition penalty, temperature, then top-k, then top-p and min-p on what is left, then renormalise. Equal logits at
    the edge of top-k or top-p stay in together, so that the set is a function of the logits alone.

    Args:
        logits: `[rows, vocab]`, of any float dtype.
        uniforms: `[rows]` float64 in (0, 1), the rows' noise.
        options: all but length and stop strings are read.
        seen: `[rows, vocab]` bool, the tokens that the repetition penalty falls on; None falls on none.

    Returns:
        Tokens `[rows]` int64, and the log-probability of each under exactly the distribution it was
        drawn from, `[rows]`, float32 or wider. At temperature 0 that is 0: the draw is certain.
        A row whose logits are NaN has a NaN log-probability.
    """
    scaled = logits.to(wide(logits.dtype))
    if seen is not None and options.repetition_penalty != 1:
        penalty = options.repetition_penalty
        lowered = torch.where(scaled > 0, scaled / penalty, scaled * penalty)
        scaled = torch.where(seen, lowered, scaled)
    if options.temperature == 0:
        top, tokens = scaled.max(dim=-1)
        return tokens, top * 0
    if options.temperature != 1:
        scaled = scaled / options.temperature
    scaled = restrict(scaled, options.top_k, options.top_p, options.min_p)
    return _invert_cdf(torch.softmax(scaled, dim=-1), uniforms)


def restrict(logits: Tensor, top_k: int, top_p: float, min_p: float = 0.0) -> Tensor:
    """Set the logits outside top-k, top-p and min-p to -inf: `[rows, vocab]` to `[rows, vocab]`.

    Top-p keeps the shortest head of the sorted tokens whose probability reaches `top_p`, the token
    that crosses the line included.

    Reference: Holtzman et al., 2020, arXiv 1904.09751, equation 2, for top-p; Nguyen et al., 2024, arXiv 2407.01082, for
    min-p; Keskar et al., 2019, arXiv 1909.05858, section 4.1, for the repetition penalty.
    """
    if 0 < top_k < logits.shape[-1]:
        ordered = logits.topk(top_k, dim=-1).values
        logits = logits.masked_fill(logits < ordered[:, -1:], -torch.inf)
    if top_p < 1:
        ordered = logits.sort(dim=-1, descending=True).values
        probs = torch.softmax(ordered, dim=-1)
        before = probs.cumsum(dim=-1) - probs
        num_kept = (before < top_p).sum(dim=-1, keepdim=True).clamp(min=1)
        logits = logits.masked_fill(logits < ordered.gather(-1, num_kept - 1), -torch.inf)
    if min_p > 0:
        # A ratio of probabilities is a difference of logits.
        limit = logits.amax(dim=-1, keepdim=True) + math.log(min_p)
        logits = logits.masked_fill(logits < limit, -torch.inf)
    return logits


def _invert_cdf(probs: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first token whose cumulative probability exceeds `uniforms`, and its logprob.

    A running sum over the vocabulary costs more than the softmax, so blocks are summed first and
    only the block that holds the answer is looked into.
    """
    rows, vocab = probs.shape
    if vocab % _BLOCK:
        probs = F.pad(probs, (0, _BLOCK - vocab % _BLOCK))
    blocks = probs.view(rows, -1, _BLOCK)
    ends = blocks.sum(dim=-1).to(torch.float64).cumsum(dim=-1)
    total = ends[:, -1:]
    target = uniforms[:, None] * total
    block = torch.searchsorted(ends, target, right=True).clamp(max=ends.shape[1] - 1)
    end = ends.gather(1, block)
    start = torch.where(block > 0, ends.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = blocks[torch.arange(rows, device=probs.device), block[:, 0]].to(torch.float64)
    running = inside.cumsum(dim=-1)
    # As a fraction of the block: its sum and its running sum may differ in the last bit, and a
    # token of probability zero must never be drawn.
    fraction = ((target - start) / (end - start)).clamp(max=1 - 2.0**-40)
    offset = torch.searchsorted(running, fraction * running[:, -1:], right=True)
    offset = offset.clamp(max=_BLOCK - 1)
    logprobs = (inside.gather(1, offset) / total).log().to(probs.dtype)
    return (block * _BLOCK + offset)[:, 0], logprobs[:, 0]
