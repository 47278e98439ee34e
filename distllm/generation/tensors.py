"""`distllm.generate`: the sampler for callers who hold padded tensors instead of lists of ids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distllm.generation import generate as ragged
from distllm.generation.options import GenerationOptions
from distllm.types import Model


def generate(
    model: Model,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    num_samples: int = 1,
    end_ids: Sequence[int] = (),
    pad_id: int = 0,
) -> Tensor:
    """Sample responses and write each behind its row of `input_ids`, or, with an encoder, behind the start token.

    Args:
        model: a language model, as `load_model` returns it.
        input_ids: `[batch, seq]` int64.
        attention_mask: `[batch, seq]`, True on real tokens, padding on either side; None = all real.
        max_new_tokens: most tokens of a response.
        temperature: 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 among all.
        top_p: draw among the likeliest tokens with this probability; 1 among all.
        min_p: draw among tokens at least this times as likely as the likeliest; 0 among all.
        repetition_penalty: above 1 makes tokens less likely that are there already; 1 is off.
        seed: equal seeds give equal responses.
        num_samples: responses per row, next to each other.
        end_ids: tokens that end a response; the one sampled is kept.
        pad_id: written behind a response that ended.

    Returns:
        `[batch * num_samples, seq + longest response]` int64 (with an encoder: 1 + longest response) on the device of `input_ids`.

    Raises:
        ConfigError: a setting is out of range.
        DataError: a row has no real token, or leaves no room for a response.
    """
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rollouts = ragged.generate(
        model,
        [row[real].tolist() for row, real in zip(input_ids, mask.bool(), strict=True)],
        GenerationOptions(
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        ),
        end_ids=end_ids,
        pad_id=pad_id,
        seed=seed,
        num_samples=num_samples,
    )
    width = max((len(r.response_ids) for r in rollouts), default=0)
    responses = [r.response_ids + [pad_id] * (width - len(r.response_ids)) for r in rollouts]
    new = torch.tensor(responses, dtype=input_ids.dtype, device=input_ids.device)
    before = input_ids.repeat_interleave(num_samples, dim=0)
    if model.abilities.two_sequences:
        before = torch.full_like(new[:, :1], model.options.decoder_start_id)
    return torch.cat([before, new], dim=1)
