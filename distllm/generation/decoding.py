"""A batch of responses under way: prefill, then a token per row and step, finished rows dropped.

`generate.py` drives it; modes (eval, no gradient, precision) are its business.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distllm.errors import ConfigError, DataError, EngineError
from distllm.generation.noise import uniforms
from distllm.generation.options import GenerationOptions, check_options
from distllm.generation.sampling import pick
from distllm.layers.precision import compute_dtype, wide
from distllm.types import Model, Rollout

COMPACT_FRACTION = 0.25
"""Finished rows leave the batch when they make up this share of it: each drop copies the cache."""


class Decoding:
    """A batch of responses that grow by one token per `step`; its rows share the cache's columns.

    Rows are (prompt, sample) pairs. `rows` lists the ones still in the batch; results are stored
    under their original number, so that dropping finished rows moves nothing.
    """

    def __init__(
        self,
        model: Model,
        prompt_ids: Sequence[Sequence[int]],
        options: GenerationOptions,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        seed: int,
        prompt_indices: Sequence[int],
        num_samples: int,
        decode: Callable[[list[int]], str] | None = None,
    ) -> None:
        check_options(options)
        if options.stop and decode is None:
            raise ConfigError(
                f"generation.stop={options.stop} can only be found in text, and no decode function "
                "was given. Pass decode=tokenizer.decode, or leave generation.stop empty."
            )
        rooms = [model.room_after(len(ids)) for ids in prompt_ids]
        _check_prompts(prompt_ids, prompt_indices, rooms, model.options.max_seq_len)
        weight = next(iter(model.parameters()))  # type: ignore[attr-defined]
        self.model, self.options, self.decode = model, options, decode
        self.device = weight.device
        self.prompt_ids = [list(ids) for ids in prompt_ids]
        self.prompt_indices, self.num_samples = list(prompt_indices), num_samples
        self.num_steps = 0
        num_rows = len(prompt_ids) * num_samples
        self.limits = torch.tensor(rooms).clamp(max=options.max_new_tokens)
        self.limits = self.limits.repeat_interleave(num_samples).to(self.device)
        num_positions = int(self.limits.max())
        self.noise = torch.from_numpy(
            uniforms(
                seed,
                [index for index in prompt_indices for _ in range(num_samples)],
                list(range(num_samples)) * len(prompt_ids),
                num_positions,
            )
        ).to(self.device)
        self.ends = torch.tensor(list(end_ids), dtype=torch.int64, device=self.device)
        self.tokens = torch.zeros(num_rows, num_positions, dtype=torch.int64, device=self.device)
        self.logprobs = torch.zeros(
            num_rows, num_positions, dtype=wide(compute_dtype(weight)), device=self.device
        )
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=self.device)
        self.stopped = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        self.rows = torch.arange(num_rows, device=self.device)
        self.done = torch.zeros(num_rows, dtype=torch.bool, device=self.device)
        # The last token of a response is never fed back.
        self.reading = model.read(prompt_ids, num_positions - 1, pad_id, compute_dtype(weight))
        if num_samples > 1:
            self.reading.repeat(num_samples)
        self.logits = model.head.logits(self.reading.last)
        self.seen = self._seen_in_prompts() if options.repetition_penalty != 1 else None

    @property
    def active(self) -> bool:
        """True while some response can still grow."""
        return len(self.rows) > 0

    def step(self) -> None:
        """Draw one token for every row in the batch, and compute the logits of the next."""
        if self.num_steps:
            last = self.reading.feed(self.tokens[self.rows, self.num_steps - 1])
            self.logits = self.model.head.logits(last)
        position = self.num_steps
        seen = None if self.seen is None else self.seen[self.rows]
        tokens, logprobs = pick(self.logits, self.noise[self.rows, position], self.options, seen)
        if self.seen is not None:
            self.seen[self.rows, tokens] = True
        self.tokens[self.rows, position] = tokens
        self.logprobs[self.rows, position] = logprobs
        self.num_steps += 1
        ended = torch.isin(tokens, self.ends)
        if self.options.stop:
            ended |= self._contain_stop(position)
        finished = (ended | (self.limits[self.rows] == self.num_steps)) & ~self.done
        self.stopped[self.rows[finished & ended]] = True
        self.lengths[self.rows[finished]] = self.num_steps
        self.done |= finished
        self._compact()

    def _seen_in_prompts(self) -> Tensor:
        """Return which tokens stand before each row's response, bool `[rows, vocab]`; with an encoder, none do."""
        seen = torch.zeros(len(self.rows), self.logits.shape[-1], dtype=torch.bool)
        if not self.model.abilities.two_sequences:
            for row in range(len(seen)):
                seen[row, self.prompt_ids[row // self.num_samples]] = True
        return seen.to(self.device)

    def _contain_stop(self, position: int) -> Tensor:
        """Return whose text holds a stop string that the newest token completed, bool `[rows]`."""
        # A token is at least one byte long, so the string lies within this many last tokens.
        span = max(len(text.encode()) for text in self.options.stop) + 4
        tails = self.tokens[self.rows, max(0, position + 1 - span) : position + 1].tolist()
        assert self.decode is not None
        texts = [self.decode(tail) for tail in tails]
        hits = [any(stop in text for stop in self.options.stop) for text in texts]
        return torch.tensor(hits, device=self.device)

    def _compact(self) -> None:
        """Drop finished rows when it pays or must."""
        num_done = int(self.done.sum())
        if (
            num_done < len(self.rows)
            and not self.reading.is_full
            and num_done < COMPACT_FRACTION * len(self.rows)
        ):
            return
        kept = (~self.done).nonzero()[:, 0]
        self.rows, self.done = self.rows[kept], self.done[kept]
        if len(kept):
            self.reading.select(kept)

    def check(self) -> None:
        """Raise EngineError if a token was drawn from logits that are NaN."""
        if bool(torch.isfinite(self.logprobs).all()):
            return
        row, position = (~torch.isfinite(self.logprobs)).nonzero()[0].tolist()
        raise EngineError(
            f"the model's logits are NaN or infinite at response token {position} of prompt "
            f"{self.prompt_indices[row // self.num_samples]}: its weights are damaged or training "
            "diverged. Sample from an earlier checkpoint."
        )

    def rollouts(self) -> list[Rollout]:
        """Return the finished responses, ordered by prompt, then by sample index."""
        self.check()
        tokens, logprobs = self.tokens.cpu(), self.logprobs.cpu()
        lengths, stopped = self.lengths.tolist(), self.stopped.tolist()
        return [
            Rollout(
                prompt_ids=list(self.prompt_ids[row // self.num_samples]),
                response_ids=tokens[row, : lengths[row]].tolist(),
                rollout_logprobs=logprobs[row, : lengths[row]].clone(),
                finish_reason="stop" if stopped[row] else "length",
                prompt_index=self.prompt_indices[row // self.num_samples],
                sample_index=row % self.num_samples,
            )
            for row in range(len(lengths))
        ]


def _check_prompts(
    prompt_ids: Sequence[Sequence[int]],
    prompt_indices: Sequence[int],
    rooms: Sequence[int],
    context: int,
) -> None:
    for ids, index, room in zip(prompt_ids, prompt_indices, rooms, strict=True):
        if not ids:
            raise DataError(f"prompt {index} is empty: nothing could predict its first token.")
        if room < 1:
            raise DataError(
                f"prompt {index} has {len(ids)} tokens, but the model reads at most {context}, "
                f"prompt and response together. Shorten the prompt to {len(ids) + room - 1} tokens."
            )
