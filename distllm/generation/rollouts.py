"""Rollouts as a few flat tensors, for checkpoints and for the way between ranks, and sampling spread over ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from distllm.engines import collectives
from distllm.types import Rollout

FINISH_REASONS = ("stop", "length")
_SCALARS = ("score", "reward", "baseline")
_FIXED = ("prompt_ids", "response_ids", "prompt_index", "sample_index", "finish_reason", *_SCALARS)
TOKEN_FIELDS = tuple(f.name for f in fields(Rollout) if f.name not in _FIXED)
"""Fields of a rollout that hold one number per response token, or None."""


def pack_rollouts(rollouts: Sequence[Rollout]) -> dict[str, Tensor]:
    """Flatten rollouts into a few tensors; a per-token field must be set in all of them or in none."""
    if not rollouts:
        return {}
    tensors = {
        "prompt_ids": torch.tensor([t for r in rollouts for t in r.prompt_ids]),
        "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in rollouts]),
        "response_ids": torch.tensor([t for r in rollouts for t in r.response_ids]),
        "response_lengths": torch.tensor([len(r.response_ids) for r in rollouts]),
        "prompt_index": torch.tensor([r.prompt_index for r in rollouts]),
        "sample_index": torch.tensor([r.sample_index for r in rollouts]),
        "finish_reason": torch.tensor([FINISH_REASONS.index(r.finish_reason) for r in rollouts]),
    }
    for name in _SCALARS:
        tensors[name] = torch.tensor([getattr(r, name) for r in rollouts], dtype=torch.float64)
    for name in TOKEN_FIELDS:
        parts = [getattr(r, name) for r in rollouts]
        if parts[0] is not None:
            tensors[name] = torch.cat(parts)
    return tensors


def unpack_rollouts(tensors: Mapping[str, Tensor]) -> list[Rollout]:
    """Undo `pack_rollouts`."""
    if not tensors:
        return []
    lengths = tensors["response_lengths"].tolist()
    prompts = tensors["prompt_ids"].split(tensors["prompt_lengths"].tolist())
    responses = tensors["response_ids"].split(lengths)
    token_fields = {n: tensors[n].split(lengths) for n in TOKEN_FIELDS if n in tensors}
    rollouts = []
    for i, reason in enumerate(tensors["finish_reason"].tolist()):
        bare = Rollout(
            prompt_ids=prompts[i].tolist(),
            response_ids=responses[i].tolist(),
            rollout_logprobs=token_fields["rollout_logprobs"][i].clone(),
            finish_reason=FINISH_REASONS[reason],
            prompt_index=int(tensors["prompt_index"][i]),
            sample_index=int(tensors["sample_index"][i]),
            **{name: tensors[name][i].item() for name in _SCALARS},  # type: ignore[arg-type]
        )
        rollouts.append(replace(bare, **{n: v[i].clone() for n, v in token_fields.items()}))
    return rollouts


def spread(
    num_prompts: int, sample: Callable[[list[int]], list[Rollout]], num_samples: int = 1
) -> list[Rollout]:
    """Answer prompts 0 .. num_prompts - 1, each on one of the ranks; return all rollouts, on all ranks, in order.

    All ranks take part, but only when every one has finished sampling. `sample` gets the numbers of this rank's
    prompts and returns `num_samples` rollouts for each, in order.
    """
    size = collectives.world_size()
    mine = sample(list(range(collectives.rank(), num_prompts, size)))
    if size == 1:
        return mine
    parts = [unpack_rollouts(t) for t in collectives.gather_tensors(pack_rollouts(mine))]
    rows = [parts[p % size][p // size * num_samples :][:num_samples] for p in range(num_prompts)]
    return [rollout for row in rows for rollout in row]
