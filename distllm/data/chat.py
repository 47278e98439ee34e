"""Dialogues to token ids through the tokenizer's chat template, and which of them are learned.

The text is tokenised once, as a whole (`rendering.py`); the mask comes from the places of tokens in
the text, never from lengths of re-tokenised prefixes, which go wrong where a token spans a
boundary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, cast

from distllm.data.rendering import Message, excerpt, render, tokenise
from distllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def encode_dialogue(
    tok: PreTrainedTokenizerFast,
    messages: Sequence[Message],
    learned: Collection[int] | None = None,
) -> tuple[list[int], list[bool]]:
    """Encode a conversation that ends with the assistant.

    Contents are encoded as plain text, even where they spell out a special token. A template that
    closes the last turn with no special token gets the tokenizer's end-of-sequence token there;
    nothing else is added or removed.

    Args:
        tok: its chat template lays the conversation out.
        messages: role and content each.
        learned: which of the assistant's messages the mask covers, by index; None for all.

    Returns:
        ids and mask, equally long; the mask is True on what the assistant says (all that follows
        where a prompt to answer would end) and on the token that ends its turn.

    Raises:
        DataError: the conversation does not end with the assistant, or the template cannot show it.
    """
    if not messages or messages[-1].get("role") != "assistant":
        raise DataError(
            "The dialogue does not end with the assistant, whose answer is to be learned: "
            f"{excerpt(messages)}"
        )
    spans = render(tok, messages, add_generation_prompt=False)
    tokens = tokenise(tok, spans)
    mask = [False] * len(tokens.ids)
    closed = False
    for number, span in enumerate(spans):
        if span.message is None or messages[span.message]["role"] != "assistant":
            continue
        is_learned = learned is None or span.message in learned
        first, last = tokens.spans[number]
        if number and spans[number - 1].leads:
            first = tokens.spans[number - 1][0]
        after = tokens.spans[number + 1]  # a content is always followed by a span of the template
        ends = [i for i in tokens.markers if _overlap(tokens.places[i], after)]
        if ends:
            last = tokens.places[ends[0]][1]
        for i, place in enumerate(tokens.places):
            # Overlap, so that a token that spans the boundary counts as the assistant's.
            mask[i] = mask[i] or (is_learned and _overlap(place, (first, last)))
        if span.message == len(messages) - 1:
            closed = bool(ends)
    if not any(mask):
        raise DataError(f"No token of the dialogue is the assistant's: {excerpt(messages)}")
    if not closed:
        eos_id = cast("int | None", tok.eos_token_id)
        if eos_id is None:
            raise DataError(
                "The chat template ends the assistant's turn with no special token and the "
                "tokenizer has no eos_token, so a model could not learn to stop. Add an "
                "end-of-turn token to the template."
            )
        tokens.ids.append(eos_id)
        mask.append(learned is None or len(messages) - 1 in learned)
    return tokens.ids, mask


def encode_prompt(tok: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """Encode a conversation that the assistant is to answer, the generation prompt included.

    Raises:
        DataError: the conversation is empty or already ends with the assistant.
    """
    if not messages or messages[-1].get("role") == "assistant":
        raise DataError(
            f"A prompt must end with a message that the assistant is to answer: {excerpt(messages)}"
        )
    return tokenise(tok, render(tok, messages, add_generation_prompt=True)).ids


def encode_answer(tok: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode what the assistant says in answer to a prompt, the end of its turn included.

    After `encode_prompt` it gives what `encode_dialogue` gives, up to what a template may write
    after the last turn.
    """
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": text}]
    ids, mask = encode_dialogue(tok, messages)
    return [token for token, said in zip(ids, mask, strict=True) if said]


def end_ids(tok: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a response: the template's end of turn, then the end of text."""
    found = [] if tok.chat_template is None else [encode_answer(tok, "a")[-1]]
    eos_id = cast("int | None", tok.eos_token_id)
    if eos_id is not None and eos_id not in found:
        found.append(eos_id)
    return found


def _overlap(place: tuple[int, int], span: tuple[int, int]) -> bool:
    return place[0] < span[1] and place[1] > span[0]
