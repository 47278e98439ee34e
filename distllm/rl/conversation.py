"""Responses of several turns: the policy says something, an environment answers, and so on, all within one response.

What the policy sampled keeps its ids and log-probabilities; what the environment said stands between, marked in `loss_mask`
as not sampled. Nothing is decoded and encoded again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from distllm.data.datasets import PromptExample
from distllm.errors import ConfigError
from distllm.generation.generate import generate
from distllm.generation.noise import derive_seed
from distllm.generation.options import GenerationOptions
from distllm.rl.environments.base import Environment
from distllm.types import Model, Rollout

_log = logging.getLogger("distllm")


@dataclass(slots=True)
class _Talk:
    """One response under way."""

    rollout: Rollout
    prompt: PromptExample
    said: list[str]
    room: int
    """Tokens that may still be added."""


@dataclass(slots=True, kw_only=True)
class Conversation:
    """Samples like `generate`, turn by turn. The noise of a turn is a function of (seed, prompt, sample, turn, position)."""

    environment: Environment
    max_turns: int
    """Turns of the policy; a response that is not over after them counts as cut."""
    encode: Callable[[str], list[int]]
    """Text of the environment -> ids, typed special tokens as text."""
    decode: Callable[[list[int]], str]
    """Ids -> text, special tokens dropped."""

    def __call__(
        self,
        model: Model,
        prompts: Sequence[PromptExample],
        options: GenerationOptions,
        *,
        end_ids: Sequence[int],
        pad_id: int,
        seed: int,
        prompt_indices: Sequence[int],
        num_samples: int = 1,
    ) -> list[Rollout]:
        """Return `num_samples` responses to each prompt, in order; `loss_mask` is set in all of them."""
        options = replace(options, stop=list(self.environment.stop))
        common: dict[str, Any] = {"end_ids": end_ids, "pad_id": pad_id, "decode": self.decode}
        turns = generate(
            model,
            [p.prompt_ids for p in prompts],
            options,
            seed=seed,
            prompt_indices=prompt_indices,
            num_samples=num_samples,
            **common,
        )
        talks = []
        for i, rollout in enumerate(turns):
            prompt = prompts[i // num_samples]
            limit = min(options.max_new_tokens, model.room_after(len(prompt.prompt_ids)))
            talks.append(_Talk(rollout, prompt, [], limit))
            rollout.loss_mask = torch.ones(0, dtype=torch.bool)
        going = list(zip(talks, turns, strict=True))
        for turn in range(1, self.max_turns + 1):
            open_talks = [talk for talk, said in going if self._take(talk, said, turn, end_ids)]
            if not open_talks:
                break
            longest = max(talk.room for talk in open_talks)
            answers = generate(
                model,
                [talk.prompt.prompt_ids + talk.rollout.response_ids for talk in open_talks],
                replace(options, max_new_tokens=longest),
                seed=derive_seed(seed, turn),
                prompt_indices=[
                    t.rollout.prompt_index * num_samples + t.rollout.sample_index
                    for t in open_talks
                ],
                **common,
            )
            going = list(zip(open_talks, answers, strict=True))
        return [talk.rollout for talk in talks]

    def sync(self, model: Model) -> None:
        """Nothing: turns are sampled by the policy's own module."""

    def sleep(self) -> None:
        """Nothing to give back."""

    def _take(self, talk: _Talk, turn: Rollout, number: int, end_ids: Sequence[int]) -> bool:
        """Write a turn, and the answer to it, into the response; say whether the policy is to go on."""
        whole, first = talk.rollout, not talk.said
        ids = turn.response_ids[: talk.room]
        if first:
            whole.response_ids, logprobs = [], whole.rollout_logprobs[: len(ids)]
            whole.rollout_logprobs = logprobs[:0]
        else:
            logprobs = turn.rollout_logprobs[: len(ids)]
        _append(whole, ids, logprobs, sampled=True)
        talk.room -= len(ids)
        talk.said.append(self.decode(ids))
        is_cut = turn.finish_reason == "length" or len(ids) < len(turn.response_ids)
        whole.finish_reason = "length" if is_cut else "stop"
        if is_cut or ids[-1] in end_ids:
            return False
        reply = self._reply(talk)
        if reply is None:
            return False
        answer = self.encode(reply)[: talk.room]
        _append(whole, answer, logprobs.new_zeros(len(answer)), sampled=False)
        talk.room -= len(answer)
        talk.said.append(reply)
        if number == self.max_turns or not talk.room:
            whole.finish_reason = "length"
            return False
        return True

    def _reply(self, talk: _Talk) -> str | None:
        """Ask the environment; a failure ends this response and no other."""
        try:
            return self.environment.reply(talk.prompt.prompt, talk.said)
        except Exception as error:
            _log.warning("stage.environment failed, which ends one response: %r", error)
            return None


def _append(rollout: Rollout, ids: list[int], logprobs: torch.Tensor, sampled: bool) -> None:
    assert rollout.loss_mask is not None
    rollout.response_ids = [*rollout.response_ids, *ids]
    rollout.rollout_logprobs = torch.cat([rollout.rollout_logprobs, logprobs])
    mask = torch.full((len(ids),), sampled)
    rollout.loss_mask = torch.cat([rollout.loss_mask, mask])


def check_can_converse(model: Model, pad_id: int) -> None:
    """Refuse a model whose response is not simply the continuation of its prompt.

    Raises:
        ConfigError: it is not, so that an environment's words cannot be read as part of it.
    """
    if not set(model.join([[pad_id]], [[pad_id]], pad_id).inputs()) <= {
        "input_ids",
        "attention_mask",
    }:
        raise ConfigError(
            f"stage.environment needs a policy that reads one sequence from left to right; {type(model).__name__} reads "
            "prompt and response apart. Use a decoder, or set stage.environment=''."
        )
