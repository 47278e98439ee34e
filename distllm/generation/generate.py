"""Batched sampling with a key/value cache: prompts in; ids, log-probabilities, reasons out.

How a batch grows is in `decoding.py`, one token's arithmetic in `sampling.py`, its noise in
`noise.py`. Text is not known here, but for stop strings. Who samples, and what for, is in `rl/`,
`train/evaluate.py` and `cli/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from distllm.errors import ConfigError
from distllm.generation.decoding import Decoding
from distllm.generation.labels import draw_labels
from distllm.generation.options import GenerationOptions, check_options
from distllm.generation.packed import packed
from distllm.generation.weights import lowered
from distllm.layers.precision import compute_dtype
from distllm.types import Model, Rollout


def generate(
    model: Model,
    prompt_ids: Sequence[Sequence[int]],
    options: GenerationOptions,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int = 0,
    prompt_indices: Sequence[int] | None = None,
    num_samples: int = 1,
    decode: Callable[[list[int]], str] | None = None,
) -> list[Rollout]:
    """Sample `num_samples` responses to each prompt.

    Each prompt is computed once, whatever `num_samples`. The noise of a token is a function of
    (`seed`, prompt index, sample index, position) only: the same arguments give the same responses,
    so pass a new seed (`noise.derive_seed`) where fresh ones are wanted. Runs in the precision that
    is active (an engine's `sampling()`, or the weights' own dtype); needs no gradient context.

    Args:
        model: a language model; it is in eval mode during the call. A classifier answers with the number of a label.
        prompt_ids: token ids, at least one per prompt.
        options: length, temperature, top_k, top_p, stop.
        end_ids: tokens that end a response; the one sampled stays in `response_ids`.
        pad_id: fills short prompts; masked, so any valid id does.
        seed: of the noise.
        prompt_indices: which prompts of the data set these are; None counts from 0.
        num_samples: responses per prompt.
        decode: token ids -> text, needed for `options.stop` only.

    Returns:
        `len(prompt_ids) * num_samples` rollouts, ordered by prompt, then by sample index.

    Raises:
        ConfigError: an option is out of range, or stop strings come without `decode`.
        DataError: a prompt is empty or leaves no room for a response.
        EngineError: the model's logits are NaN.
    """
    indices = list(range(len(prompt_ids)) if prompt_indices is None else prompt_indices)
    if len(indices) != len(prompt_ids):
        raise ValueError(f"{len(prompt_ids)} prompts have {len(indices)} prompt indices")
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} must be at least 1. Set num_samples=1.")
    if not prompt_ids:
        check_options(options)
        return []
    dtype, num_rows = _dtype(model), len(prompt_ids) * num_samples
    with lowered(model, dtype), packed(model, dtype, num_rows), _inference(model):  # type: ignore[arg-type]
        if model.head_name == "classify":
            return draw_labels(
                model,
                prompt_ids,
                options,
                pad_id=pad_id,
                seed=seed,
                prompt_indices=indices,
                num_samples=num_samples,
            )
        decoding = Decoding(
            model,
            prompt_ids,
            options,
            end_ids=end_ids,
            pad_id=pad_id,
            seed=seed,
            prompt_indices=indices,
            num_samples=num_samples,
            decode=decode,
        )
        while decoding.active:
            decoding.step()
    return decoding.rollouts()


def stream(
    model: Model,
    prompt_ids: Sequence[int],
    options: GenerationOptions,
    *,
    end_ids: Sequence[int],
    pad_id: int,
    seed: int = 0,
    decode: Callable[[list[int]], str] | None = None,
) -> Iterator[int]:
    """Yield the tokens of one response as they are drawn: those `generate` returns for this prompt.

    The end token is yielded too. Until the stream ends or is closed the model may hold its
    matrices in the dtype of the computation; grad and eval mode are put back between tokens.
    """
    dtype = _dtype(model)
    with lowered(model, dtype), packed(model, dtype, 1):  # type: ignore[arg-type]
        with _inference(model):
            decoding = Decoding(
                model,
                [prompt_ids],
                options,
                end_ids=end_ids,
                pad_id=pad_id,
                seed=seed,
                prompt_indices=[0],
                num_samples=1,
                decode=decode,
            )
        while decoding.active:
            with _inference(model):
                decoding.step()
            decoding.check()
            yield int(decoding.tokens[0, decoding.num_steps - 1])


@contextmanager
def _inference(model: Any) -> Iterator[None]:
    """Eval mode and no gradient; the modes found are put back."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


def _dtype(model: Any) -> torch.dtype:
    """Return the dtype heavy work runs in: autocast's if it is active, else that of the weights."""
    return compute_dtype(next(iter(model.parameters())))
