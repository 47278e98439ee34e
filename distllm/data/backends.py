"""Private copies of a tokenizer's backend, which decide what counts as a special token in a text.

They add nothing, truncate nothing and pad nothing, whatever was last asked of the tokenizer itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from distllm.errors import ConfigError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

FIRST_STAND_IN = 0x100000
"""Stand-ins for markers are single characters of the last private-use plane."""


class Backends:
    """The copies of one tokenizer. An added token is *special* where its tokenizer says so."""

    _known: WeakKeyDictionary[Any, Backends] = WeakKeyDictionary()

    def __init__(self, tok: PreTrainedTokenizerFast) -> None:
        from tokenizers import Tokenizer

        self.size = len(tok)
        self._spec = json.loads(backend_of(tok).to_str())
        self._spec.update(post_processor=None, truncation=None, padding=None)
        self.full: Tokenizer = Tokenizer.from_str(json.dumps(self._spec))
        """Knows all added tokens."""
        self.added: dict[int, Any] = self.full.get_added_tokens_decoder()
        """Id -> added token."""
        self.special = {i for i, token in self.added.items() if token.special}
        self.unknown = cast("int | None", tok.unk_token_id)
        self.skeletons: dict[str, tuple[list[str], list[int]]] = {}
        """What `rendering.py` learned about chat templates."""
        self._guarded: dict[frozenset[int], Guarded] = {}

    @classmethod
    def of(cls, tok: PreTrainedTokenizerFast) -> Backends:
        """Return the copies for `tok`, built anew after tokens were added to it."""
        known = cls._known.get(tok)
        if known is None or known.size != len(tok):
            known = cls._known[tok] = cls(tok)
        return known

    def guarded(self, markers: Collection[int], *, stand_ins: bool = True) -> Guarded:
        """Return a copy to which the text of `markers` is plain text."""
        key = frozenset(markers) | (frozenset() if stand_ins else {-1})
        if key not in self._guarded:
            # Longest first, as the tokenizer itself prefers.
            order = sorted(markers, key=lambda i: -len(self.added[i].content)) if stand_ins else []
            names = {i: chr(FIRST_STAND_IN + n) for n, i in enumerate(order)}
            kept = {i: t for i, t in self.added.items() if i in names or i not in markers}
            self._guarded[key] = Guarded(self._spec, kept, names)
        return self._guarded[key]


class Guarded:
    """A copy that knows some added tokens under another name, which no text holds by accident."""

    def __init__(
        self, spec: Mapping[str, Any], tokens: Mapping[int, Any], names: Mapping[int, str]
    ) -> None:
        from tokenizers import AddedToken, Tokenizer

        self.tokenizer: Tokenizer = Tokenizer.from_str(json.dumps({**spec, "added_tokens": []}))
        for i, token in tokens.items():
            known = AddedToken(
                names.get(i, token.content),
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized and i not in names,
                special=token.special,
            )
            if token.special:
                self.tokenizer.add_special_tokens([known])
            else:
                self.tokenizer.add_tokens([known])
        self.real = {self.tokenizer.token_to_id(names.get(i, tokens[i].content)): i for i in tokens}
        """Id of an added token here -> its id in the tokenizer that was copied."""
        self._names = {tokens[i].content: name for i, name in names.items()}
        self._spelled = re.compile("|".join(map(re.escape, self._names)) or "(?!)")

    def stand_in(self, text: str) -> str:
        """Put the other names in place of the tokens that `text` spells out."""
        return self._spelled.sub(lambda match: self._names[match[0]], text)


def backend_of(tok: PreTrainedTokenizerFast) -> Tokenizer:
    """Return the `tokenizers` object inside.

    Raises:
        ConfigError: the tokenizer is a slow one, without offsets.
    """
    backend = getattr(tok, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError(
            f"{type(tok).__name__} has no fast form (tokenizer.json), which is needed to know "
            "where tokens stand in the text. Convert it with transformers first."
        )
    return backend
