"""Dialogues to text and back to places: what the chat template writes, where each content stands, one tokenisation.

The template is rendered twice: once with the real contents, once with placeholders that show where each content
lands. Which tokens are the assistant's is decided in `chat.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from distllm.data.tokenizer import backend_of
from distllm.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

Message = dict[str, str]

_PLACEHOLDER = "\ue0f0{}\ue0f1"
_PLACEHOLDERS = re.compile("\ue0f0(\\d+)\ue0f1")
_FIRST_STAND_IN = 0x100000
"""Stand-ins for added tokens are single characters of the last private-use plane."""


@dataclass(slots=True)
class Span:
    """A stretch of the rendered text: a message's content, or what the template writes around it."""

    text: str
    message: int | None
    """Index of the message whose content this is; None for the template's own text."""
    leads: bool = False
    """Template text between where a generation prompt ends and the assistant's content: said by the assistant."""


@dataclass(slots=True)
class Tokenised:
    """A rendered dialogue as tokens."""

    ids: list[int]
    places: list[tuple[int, int]]
    """Where each token stands, in characters of the text that was tokenised."""
    added: list[int]
    """Which tokens are added tokens of the template (turn markers and the like)."""
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
        f"The chat template does not show every message once and unchanged (it shows {len(shown)} contents for "
        f"{len(messages)} messages), so the assistant's words cannot be told from the rest: {excerpt(messages)}"
    )


def tokenise(tok: PreTrainedTokenizerFast, spans: Sequence[Span]) -> Tokenised:
    """Tokenise the rendered dialogue as a whole, with the template's added tokens as such and no others.

    Where no content spells out an added token, this is the plain tokenisation of the text. Where one does, the
    template's own are replaced by stand-ins that only it can write, and the tokenizer is made to know those alone.

    Raises:
        DataError: the tokenizer turns a typed special token into the real one all the same.
    """
    known = _Backends.of(tok)
    texts = [span.text for span in spans]
    text = "".join(texts)
    encoding = known.full.encode(text, add_special_tokens=False)
    bounds = _bounds(texts)
    ids = encoding.ids
    added = [
        i
        for i, token in enumerate(ids)
        if token in known.added
        # Most often the unknown token is just that; only spelled out it is an added token.
        and (token != known.unknown or text[slice(*encoding.offsets[i])] == tok.unk_token)
    ]
    places = encoding.offsets
    own = [bound for bound, span in zip(bounds, spans, strict=True) if span.message is None]
    if all(_inside(places[i], own) for i in added):
        return Tokenised(ids, places, added, bounds)

    for span in spans:
        if span.message is not None and any(ord(c) >= _FIRST_STAND_IN for c in span.text):
            raise DataError(
                f"A message holds private-use characters: {span.text[:100]!r}. Remove them."
            )
    texts = [known.stand_in(span.text) if span.message is None else span.text for span in spans]
    encoding = known.guarded.encode("".join(texts), add_special_tokens=False)
    ids, added = [], []
    for i, token in enumerate(encoding.ids):
        if token in known.real:
            added.append(i)
        elif token in known.added and token != known.unknown:
            raise DataError(
                f"This tokenizer turns {tok.convert_ids_to_tokens(token)!r} typed in a message into the real "
                f"token, even when told not to. Remove it from the data: {''.join(texts)[:200]!r}"
            )
        ids.append(known.real.get(token, token))
    return Tokenised(ids, encoding.offsets, added, _bounds(texts))


def excerpt(messages: Sequence[Message]) -> str:
    """Show enough of a dialogue to find it."""
    shown = repr([dict(m) for m in messages])
    return shown if len(shown) <= 200 else shown[:197] + "..."


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
        raise DataError(
            f"The chat template refuses the dialogue: {error}: {excerpt(messages)}"
        ) from error


def _skeleton(
    tok: Any, messages: Sequence[Message], add_generation_prompt: bool, *, cached: bool
) -> tuple[list[str], list[int]]:
    """Render with placeholders; return the template's own pieces and the messages whose contents stand between.

    What comes out depends on everything but the contents, and is kept by that.
    """
    rest = [{k: v for k, v in m.items() if k != "content"} for m in messages]
    key = repr((tok.chat_template, rest, add_generation_prompt))
    known = _Backends.of(tok).skeletons
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


class _Backends:
    """Private copies of a tokenizer that add nothing and never truncate or pad, whatever was last asked of it."""

    _known: WeakKeyDictionary[Any, _Backends] = WeakKeyDictionary()

    def __init__(self, tok: PreTrainedTokenizerFast) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.size = len(tok)
        self.skeletons: dict[str, tuple[list[str], list[int]]] = {}
        """What `_skeleton` found, by all it depends on."""
        spec = json.loads(backend_of(tok).to_str())
        spec.update(post_processor=None, truncation=None, padding=None)
        self.full: Tokenizer = Tokenizer.from_str(json.dumps(spec))
        tokens = self.full.get_added_tokens_decoder()
        self.added = set(tokens)
        self.unknown = tok.unk_token_id
        # Longest first, as the tokenizer itself prefers.
        order = sorted(tokens, key=lambda i: -len(tokens[i].content))
        stand_ins = {tokens[i].content: chr(_FIRST_STAND_IN + n) for n, i in enumerate(order)}
        self.guarded: Tokenizer = Tokenizer.from_str(json.dumps(spec | {"added_tokens": []}))
        self.guarded.add_special_tokens(
            [
                AddedToken(
                    stand_ins[tokens[i].content],
                    lstrip=tokens[i].lstrip,
                    rstrip=tokens[i].rstrip,
                    normalized=False,
                )
                for i in order
            ]
        )
        self.real = {self.guarded.token_to_id(stand_ins[tokens[i].content]): i for i in order}
        """Id of a stand-in -> id of the token it stands for."""
        self._stand_ins = stand_ins
        self._spelled = re.compile("|".join(map(re.escape, stand_ins)) or "(?!)")

    def stand_in(self, text: str) -> str:
        """Put stand-ins in place of the added tokens in the template's own text."""
        return self._spelled.sub(lambda match: self._stand_ins[match[0]], text)

    @classmethod
    def of(cls, tok: PreTrainedTokenizerFast) -> _Backends:
        """Return the copies for `tok`, built at the first call and after tokens were added to it."""
        known = cls._known.get(tok)
        if known is None or known.size != len(tok):
            known = cls._known[tok] = cls(tok)
        return known
