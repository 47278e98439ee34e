"""Dialogues as text: what the chat template writes, where each content stands, one tokenisation.

The template is rendered twice: once with the real contents, once with placeholders that show where
each content lands. Which tokens are the assistant's is decided in `chat.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from distllm.data.backends import FIRST_STAND_IN, Backends
from distllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

_PLACEHOLDER = "\ue0f0{}\ue0f1"
_PLACEHOLDERS = re.compile("\ue0f0(\\d+)\ue0f1")


@dataclass(slots=True)
class Span:
    """A stretch of the rendered text: a message's content, or the template's own words."""

    text: str
    message: int | None
    """Index of the message whose content this is; None for the template's own text."""
    leads: bool = False
    """Template text between where a prompt to answer ends and the assistant's content."""


@dataclass(slots=True)
class Tokenised:
    """A rendered dialogue as tokens."""

    ids: list[int]
    places: list[tuple[int, int]]
    """Where each token stands, in characters of the text that was tokenised."""
    markers: list[int]
    """Which tokens are the template's turn markers and the like."""
    spans: list[tuple[int, int]]
    """Where each span stands, in the same characters."""


def render(
    tok: PreTrainedTokenizerFast, messages: Sequence[Message], *, add_generation_prompt: bool
) -> list[Span]:
    """Render the dialogue and find where each content stands in the text.

    Raises:
        ConfigError: the tokenizer has no chat template.
        DataError: a message is malformed, or the template refuses, drops, repeats or changes one.
    """
    for message in messages:
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise DataError(f"A message needs a role and a content, both strings: {message!r}")
    rendered = _apply(tok, messages, add_generation_prompt)
    shown: list[int] = []
    for cached in (True, False):  # a template may write the date: what it wrote before may be stale
        pieces, shown = _skeleton(tok, messages, add_generation_prompt, cached=cached)
        if sorted(shown) != list(range(len(messages))):
            continue
        for change in (str, str.strip):  # many templates strip the contents
            spans = [Span(pieces[0], None)]
            for index, own in zip(shown, pieces[1:], strict=True):
                spans += [Span(change(messages[index]["content"]), index), Span(own, None)]
            if "".join([span.text for span in spans]) == rendered:
                return _split_leads(tok, messages, spans)
    raise DataError(
        f"The chat template does not show every message once and unchanged (it shows {len(shown)} "
        f"contents for {len(messages)} messages), so the assistant's words cannot be told from the "
        f"rest: {excerpt(messages)}"
    )


def tokenise(tok: PreTrainedTokenizerFast, spans: Sequence[Span]) -> Tokenised:
    """Tokenise the dialogue as a whole, with the template's markers as such and no others.

    Markers are the special tokens, and what other added tokens the template writes. Where no
    content spells one out, this is the plain tokenisation of the text. Where one does, the
    template's are replaced by stand-ins that only it can write, and a copy of the tokenizer that
    knows those alone is asked.

    Raises:
        DataError: the tokenizer turns a typed special token into the real one all the same.
    """
    known = Backends.of(tok)
    texts = [span.text for span in spans]
    text = "".join(texts)
    found = known.full.encode(text, add_special_tokens=False)
    ids, places, bounds = found.ids, found.offsets, _bounds(texts)
    own = [bound for bound, span in zip(bounds, spans, strict=True) if span.message is None]
    spelled = [text[start:end] for start, end in places]
    added = [
        i
        for i, token in enumerate(ids)
        # Runs of spaces are added tokens in some tokenizers, but mark nothing; and the unknown
        # token is most often just that, and a marker only where it is spelled out.
        if token in known.added
        and spelled[i].strip()
        and (token != known.unknown or spelled[i] == tok.unk_token)
    ]
    written = [i for i in added if _inside(places[i], own)]
    markers = known.special | {ids[i] for i in written}
    if not any(ids[i] in markers for i in set(added).difference(written)):
        return Tokenised(ids, places, written, bounds)

    for span in spans:
        if span.message is not None and any(ord(c) >= FIRST_STAND_IN for c in span.text):
            raise DataError(
                f"A message holds private-use characters: {span.text[:100]!r}. Remove them."
            )
    guarded = known.guarded(markers)
    texts = [guarded.stand_in(span.text) if span.message is None else span.text for span in spans]
    found = guarded.tokenizer.encode("".join(texts), add_special_tokens=False)
    ids, written = [], []
    for i, token in enumerate(found.ids):
        real = guarded.real.get(token, token)
        if token in guarded.real and real in markers:
            written.append(i)
        elif real in markers and real != known.unknown:
            raise DataError(
                f"This tokenizer turns {known.added[real].content!r} typed in a message into the "
                f"real token, even when told not to. Remove it from the data: {text[:200]!r}"
            )
        ids.append(real)
    return Tokenised(ids, found.offsets, written, _bounds(texts))


def excerpt(messages: Sequence[Message]) -> str:
    """Show enough of a dialogue to find it."""
    shown = repr([dict(m) for m in messages])
    return shown if len(shown) <= 200 else shown[:197] + "..."


def _apply(tok: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Render through the template, turning its complaints into ours."""
    if tok.chat_template is None:
        raise ConfigError(
            "The tokenizer has no chat template. Set tokenizer=DIR to one that has, or put "
            "chat_template.jinja beside its tokenizer.json."
        )
    from jinja2.exceptions import TemplateError

    try:
        return tok.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise DataError(
            f"The chat template refuses the dialogue: {error}: {excerpt(messages)}"
        ) from error


def _skeleton(
    tok: Any, messages: Sequence[Message], add_generation_prompt: bool, *, cached: bool
) -> tuple[list[str], list[int]]:
    """Return the template's own pieces and the messages whose contents stand between them.

    What comes out depends on everything but the contents, and is kept by that.
    """
    rest = [{k: v for k, v in m.items() if k != "content"} for m in messages]
    key = repr((tok.chat_template, rest, add_generation_prompt))
    known = Backends.of(tok).skeletons
    if not cached or key not in known:
        marked = [dict(m, content=_PLACEHOLDER.format(i)) for i, m in enumerate(messages)]
        pieces = _PLACEHOLDERS.split(_apply(tok, marked, add_generation_prompt))
        known[key] = pieces[::2], [int(index) for index in pieces[1::2]]
    return known[key]


def _split_leads(tok: Any, messages: Sequence[Message], spans: list[Span]) -> list[Span]:
    """Cut the template's text before each assistant content where a generation prompt would end.

    A model that is asked to answer sees the text up to there, and has to say the rest itself.
    """
    pieces, _ = _skeleton(tok, [{"role": "user", "content": "."}], True, cached=True)
    end = pieces[-1]
    found: list[Span] = []
    for span in spans:
        before = found[-1] if found else None
        said = span.message is not None and messages[span.message]["role"] == "assistant"
        if said and before and before.text.startswith(end) and before.text != end:
            found[-1:] = [Span(end, None), Span(before.text[len(end) :], None, leads=True)]
        found.append(span)
    return found


def _inside(place: tuple[int, int], bounds: Sequence[tuple[int, int]]) -> bool:
    return any(start <= place[0] and place[1] <= end for start, end in bounds)


def _bounds(texts: Sequence[str]) -> list[tuple[int, int]]:
    bounds, at = [], 0
    for text in texts:
        bounds.append((at, at + len(text)))
        at += len(text)
    return bounds
