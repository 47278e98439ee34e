"""The sampler of models that do not write: a response is one label, drawn from a classifier's distribution."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from distllm.errors import DataError
from distllm.generation.noise import uniforms
from distllm.generation.options import GenerationOptions
from distllm.generation.sampling import pick
from distllm.types import Model, Rollout


def draw_labels(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    pad_id: int,
    seed: int,
    prompt_indices: Sequence[int],
    num_samples: int,
) -> list[Rollout]:
    """Draw `num_samples` labels for each text; arguments and order as of `generate`.

    Returns:
        Rollouts whose only response id is the number of a label.

    Raises:
        DataError: a text is empty or longer than the model reads.
    """
    longest = model.options.max_seq_len
    for ids, index in zip(prompt_ids, prompt_indices, strict=True):
        if not 0 < len(ids) <= longest:
            raise DataError(f"text {index} has {len(ids)} tokens, must have 1 to {longest}.")
    batch = model.join(prompt_ids, [[]] * len(prompt_ids), pad_id)
    device = next(iter(model.parameters())).device  # type: ignore[attr-defined]
    batch = batch.to(device)
    hidden = model(**batch.inputs(), compute_logits=False).last_hidden_state
    logits = model.head.logits(hidden, batch.output_mask)
    logits = logits.repeat_interleave(num_samples, dim=0)
    rows = [index for index in prompt_indices for _ in range(num_samples)]
    samples = list(range(num_samples)) * len(prompt_ids)
    noise = torch.from_numpy(uniforms(seed, rows, samples, 1)[:, 0]).to(logits.device)
    labels, logprobs = pick(logits, noise, options)
    return [
        Rollout(
            prompt_ids=list(prompt_ids[row // num_samples]),
            response_ids=[label],
            rollout_logprobs=logprob[None].cpu(),
            finish_reason="stop",
            prompt_index=rows[row],
            sample_index=samples[row],
        )
        for row, (label, logprob) in enumerate(zip(labels.tolist(), logprobs, strict=True))
    ]
