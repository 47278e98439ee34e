"""Token ids to text while they arrive. For finished responses, see the tokenizer's `decode`."""

from typing import Any

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character (yet)


class TextStream:
    """Turns tokens into text piece by piece; a character split over tokens comes out whole.

    The pieces, joined, are the text of all tokens. Bytes that never become a character come out as
    U+FFFD, at the latest with `flush`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0
        """First token that is decoded again, as context: some tokenizers drop a leading space."""
        self._end = 0
        """Tokens before this one have been returned as text."""

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is new and complete, which may be empty."""
        self._ids.append(token_id)
        return self._take(complete_only=True)

    def flush(self) -> str:
        """Return what is left."""
        return self._take(complete_only=False)

    def _take(self, complete_only: bool) -> str:
        known = self._decode(self._ids[self._start : self._end])
        text = self._decode(self._ids[self._start :])
        if complete_only and text.endswith(_BROKEN):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return text[len(known) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""
