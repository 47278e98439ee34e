"""Dialogues to token ids through the tokenizer's own chat template, with a mask of what the assistant says.

The template is rendered twice: once with the real contents, once with placeholders that show where each content
lands. The text is tokenised once, as a whole; the mask comes from the places of tokens in the text, never from
lengths of re-tokenised prefixes, which go wrong where a token spans a boundary.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distllm.data.tokenizer import backend_copies
from distllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

_PLACEHOLDER = "\ue0f0{}\ue0f1"
_PLACEHOLDERS = re.compile("\ue0f0(\\d+)\ue0f1")


@dataclass(slots=True)
class _Span:
    """A stretch of the rendered text: a message's content, or what the template writes around it."""

    start: int
    end: int
    message: int | None
    """Index of the message whose content this is; None for the template's own text."""


def encode_dialogue(
    tok: PreTrainedTokenizerFast, messages: Sequence[Message]
) -> tuple[list[int], list[bool]]:
    """Encode a conversation that ends with the assistant.

    Returns:
        ids and mask, equally long; the mask is True on what the assistant says, the token that ends its turn
        included. Contents are encoded as plain text, even where they spell out a special token. A template that
        closes the last turn with nothing gets the tokenizer's end-of-sequence token there.

    Raises:
        DataError: the conversation does not end with the assistant, or the template cannot show it.
    """
    if not messages or messages[-1].get("role") != "assistant":
        last = messages[-1].get("role") if messages else None
        raise DataError(
            f"The dialogue ends with role {last!r}; the last message must be the assistant's answer: "
            f"{_excerpt(messages)}"
        )
    text, spans = _render(tok, messages, add_generation_prompt=False)
    ids, places, added = _tokenise(tok, text, spans)
    mask = [False] * len(ids)
    for number, span in enumerate(spans):
        if span.message is None or messages[span.message]["role"] != "assistant":
            continue
        after = spans[number + 1] if number + 1 < len(spans) else None
        limit = span.end
        if after is not None and after.message is None:
            ends = [places[i] for i in added if after.start <= places[i][0] < after.end]
            limit = min(ends)[1] if ends else span.end
        for i, (start, end) in enumerate(places):
            # Overlap, so that a token that spans the boundary counts as the assistant's.
            mask[i] = mask[i] or (start < limit and end > span.start and end > start)
        if span.message == len(messages) - 1 and limit == span.end:
            if tok.eos_token_id is None:
                raise DataError(
                    "The chat template ends the assistant's turn with no special token and the tokenizer has no "
                    "eos_token: a model could never learn to stop. Add an end-of-turn token to the template."
                )
            ids.append(tok.eos_token_id)
            mask.append(True)
    if not any(mask):
        raise DataError(f"No token of the dialogue is the assistant's: {_excerpt(messages)}")
    return ids, mask


def encode_prompt(tok: PreTrainedTokenizerFast, messages: Sequence[Message]) -> list[int]:
    """Encode a conversation that the assistant is to answer, the generation prompt included.

    Raises:
        DataError: the conversation is empty or already ends with the assistant.
    """
    if not messages or messages[-1].get("role") == "assistant":
        raise DataError(
            f"A prompt must end with a message that the assistant is to answer: {_excerpt(messages)}"
        )
    text, spans = _render(tok, messages, add_generation_prompt=True)
    return _tokenise(tok, text, spans)[0]


def encode_answer(tok: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Encode what the assistant says in answer to a prompt, the end of its turn included."""
    messages = [{"role": "user", "content": "."}, {"role": "assistant", "content": text}]
    ids, mask = encode_dialogue(tok, messages)
    return [i for i, own in zip(ids, mask, strict=True) if own]


def end_ids(tok: PreTrainedTokenizerFast) -> list[int]:
    """Return the ids that end a response: the template's end of turn first, then the end of a document."""
    found = [] if tok.chat_template is None else [encode_answer(tok, "a")[-1]]
    if tok.eos_token_id is not None and tok.eos_token_id not in found:
        found.append(tok.eos_token_id)
    return found


def _render(
    tok: PreTrainedTokenizerFast, messages: Sequence[Message], *, add_generation_prompt: bool
) -> tuple[str, list[_Span]]:
    """Render the dialogue and find where each content stands in the text."""
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"A message needs a role and a content, both strings: {message!r}")
    marked = [dict(m, content=_PLACEHOLDER.format(i)) for i, m in enumerate(messages)]
    skeleton = _apply(tok, marked, add_generation_prompt)
    rendered = _apply(tok, messages, add_generation_prompt)
    for change in (str, str.strip):  # many templates strip the content
        text, spans = _fill(skeleton, [change(m["content"]) for m in messages])
        shown = sorted(s.message for s in spans if s.message is not None)
        if shown == list(range(len(messages))) and text == rendered:
            return text, spans
    raise DataError(
        f"The chat template does not show every message once and unchanged (it shows messages {shown} of "
        f"{len(messages)}), so what the assistant says cannot be told from the rest: {_excerpt(messages)}"
    )


def _apply(tok: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Render through the template, turning its complaints into ours."""
    if tok.chat_template is None:
        raise ConfigError(
            "The tokenizer has no chat template. Set tokenizer=DIR to one that has, or put chat_template.jinja "
            "beside its tokenizer.json."
        )
    from jinja2.exceptions import TemplateError

    try:
        return tok.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(f"The chat template refuses the dialogue: {error}: {_excerpt(messages)}") from error


def _fill(skeleton: str, contents: Sequence[str]) -> tuple[str, list[_Span]]:
    """Put the contents in place of the placeholders and say where everything stands."""
    text, spans, at = "", [], 0
    for match in _PLACEHOLDERS.finditer(skeleton):
        index = int(match[1])
        for piece, message in ((skeleton[at : match.start()], None), (contents[index], index)):
            if piece or message is not None:
                spans.append(_Span(len(text), len(text) + len(piece), message))
                text += piece
        at = match.end()
    if skeleton[at:]:
        spans.append(_Span(len(text), len(text) + len(skeleton) - at, None))
        text += skeleton[at:]
    return text, spans


def _tokenise(
    tok: PreTrainedTokenizerFast, text: str, spans: Sequence[_Span]
) -> tuple[list[int], list[tuple[int, int]], list[int]]:
    """Tokenise the rendered dialogue; return ids, their places in the text, and which tokens the template added.

    Added tokens cut the text into pieces that the tokenizer treats independently. If the whole-text tokenisation
    finds them only in the template's own text, it is the answer. Otherwise a content spells some out: then the
    pieces between the template's are encoded by a tokenizer that knows no added tokens.
    """
    full, plain = backend_copies(tok)
    added_ids = set(full.get_added_tokens_decoder())
    encoding = full.encode(text, add_special_tokens=False)
    added = [i for i, token in enumerate(encoding.ids) if token in added_ids]
    own = [s for s in spans if s.message is None]
    genuine = [i for i in added if _inside(encoding.offsets[i], own)]
    if len(genuine) == len(added):
        return encoding.ids, encoding.offsets, added
    ids: list[int] = []
    places: list[tuple[int, int]] = []
    kept: list[int] = []
    cuts = [(encoding.offsets[i], encoding.ids[i]) for i in genuine] + [((len(text), len(text)), -1)]
    at = 0
    for (start, end), token in cuts:
        if start > at:
            piece = plain.encode(text[at:start], add_special_tokens=False)
            if added_ids.intersection(piece.ids):
                raise DataError(
                    f"This tokenizer turns special tokens typed in a message into the real ones, even when told "
                    f"not to: {text[at:start]!r}. Remove them from the data."
                )
            ids += piece.ids
            places += [(at + a, at + b) for a, b in piece.offsets]
        if token >= 0:
            kept.append(len(ids))
            ids.append(token)
            places.append((start, end))
        at = end
    return ids, places, kept


def _inside(place: tuple[int, int], spans: Sequence[_Span]) -> bool:
    """Say whether a token stands wholly in one of the spans."""
    return any(s.start <= place[0] and place[1] <= s.end for s in spans)


def _excerpt(messages: Sequence[Message]) -> str:
    """Show enough of a dialogue to find it."""
    shown = repr([dict(m) for m in messages])
    return shown if len(shown) <= 200 else shown[:197] + "..."
