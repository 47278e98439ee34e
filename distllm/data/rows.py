"""Rows to records: which columns make which record, and what each must hold.

| columns | record |
|---|---|
| `chosen`, `rejected` (and `prompt`, unless both are whole conversations) | Pair |
| `prompt` or `messages`, with `answer` | Prompt with a checkable answer |
| `prompt`, `completion` | Dialogue |
| `messages` | Dialogue |
| `prompt` | Prompt |
| `text` (or what `data.text_key` says) | Document |

A prompt, and a chosen or rejected answer, is a string or a list of messages. Other columns are
ignored.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from distllm.types import Dialogue, Document, Pair, Prompt, Record

Messages = list[dict[str, str]]


def form_of(row: Any, text_key: str) -> str | None:
    """Name the columns that decide what `row` is, or None if there are no such columns."""
    if not isinstance(row, Mapping):
        return None
    keys = row.keys()
    if {"chosen", "rejected"} <= keys:
        return "chosen+rejected"
    if "answer" in keys and ("messages" in keys or "prompt" in keys):
        return "messages+answer" if "messages" in keys else "prompt+answer"
    if {"prompt", "completion"} <= keys:
        return "prompt+completion"
    return next((key for key in ("messages", "prompt", text_key) if key in keys), None)


def to_record(row: Any, text_key: str) -> Record:
    """Check a row and turn it into a record.

    Raises:
        ValueError: with the reason, naming the column.
    """
    form = form_of(row, text_key)
    if form is None:
        raise ValueError(_describe_missing(row, text_key))
    if form == text_key:
        return Document(text=_string(row, text_key))
    return _MAKERS[form](row)


def content_key(record: Record) -> str:
    """Return what must not be both in training and held out: a text, or what an answer answers."""
    match record:
        case Document():
            return record.text
        case Dialogue():
            return json.dumps(record.messages[:-1] or record.messages)
        case Pair():
            return json.dumps(record.prompt)
        case Prompt():
            return json.dumps(record.messages)


def _pair(row: Mapping[str, Any]) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = _asked(row, "prompt") if "prompt" in row else _shared_prompt(chosen, rejected)
    good = _answer_after(prompt, chosen, "chosen")
    bad = _answer_after(prompt, rejected, "rejected")
    if good == bad:
        raise ValueError(f"chosen and rejected are the same: {good[:50]!r}")
    return Pair(
        prompt=prompt, chosen=good, rejected=bad, kind=_label(row, "kind"), task=_label(row, "task")
    )


def _messages_answer(row: Mapping[str, Any]) -> Prompt:
    messages = _asked(row, "messages")
    return Prompt(messages=messages, answer=_string(row, "answer"), task=_label(row, "task"))


def _prompt_answer(row: Mapping[str, Any]) -> Prompt:
    messages = _asked(row, "prompt")
    return Prompt(messages=messages, answer=_string(row, "answer"), task=_label(row, "task"))


def _prompt_completion(row: Mapping[str, Any]) -> Dialogue:
    prompt = _asked(row, "prompt")
    answer = {
        "role": "assistant",
        "content": _answer_after(prompt, row["completion"], "completion"),
    }
    return Dialogue(messages=[*prompt, answer], task=_label(row, "task"))


def _prompt_only(row: Mapping[str, Any]) -> Prompt:
    return Prompt(messages=_asked(row, "prompt"), task=_label(row, "task"))


def _conversation(row: Mapping[str, Any]) -> Dialogue:
    messages = _messages(row["messages"], "messages")
    _check_last(messages, "messages", assistant=True)
    return Dialogue(messages=messages, task=_label(row, "task"))


_MAKERS: dict[str, Callable[[Mapping[str, Any]], Record]] = {
    "chosen+rejected": _pair,
    "messages+answer": _messages_answer,
    "prompt+answer": _prompt_answer,
    "prompt+completion": _prompt_completion,
    "messages": _conversation,
    "prompt": _prompt_only,
}


def _asked(row: Mapping[str, Any], key: str) -> Messages:
    """Read a prompt: what the user says, or messages that do not end with the assistant."""
    if isinstance(row[key], list):
        messages = _messages(row[key], key)
        _check_last(messages, key, assistant=False)
        return messages
    return [{"role": "user", "content": _string(row, key)}]


def _shared_prompt(chosen: Any, rejected: Any) -> Messages:
    """Find the messages that two whole conversations share: all but the last of each."""
    if not isinstance(chosen, list) or not isinstance(rejected, list):
        raise ValueError("there is no prompt, and chosen and rejected are not whole conversations")
    prompt = _messages(chosen, "chosen")[:-1]
    if not prompt or prompt != _messages(rejected, "rejected")[:-1]:
        raise ValueError(
            "there is no prompt, and chosen and rejected differ before their last message"
        )
    _check_last(prompt, "chosen without its last message", assistant=False)
    return prompt


def _answer_after(prompt: Messages, value: Any, key: str) -> str:
    """Read an answer: a string, the assistant's message, or the prompt with it."""
    if not isinstance(value, list):
        return _check_string(value, key)
    messages = _messages(value, key)
    _check_last(messages, key, assistant=True)
    if len(messages) > 1 and messages[:-1] != prompt:
        raise ValueError(f"{key} is a conversation that does not begin with the prompt")
    return messages[-1]["content"]


def _messages(value: Any, key: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {_shown(value)}, must be a list of messages")
    found: Messages = []
    for number, message in enumerate(value, start=1):
        where = f"{key}[{number}]"
        if not isinstance(message, Mapping):
            raise ValueError(
                f"{where} is {_shown(message)}, must be an object with role and content"
            )
        role = _check_string(message.get("role"), f"{where}.role")
        # Empty system prompts are common and harmless; an empty turn is neither.
        content = _check_string(message.get("content"), f"{where}.content", empty=role == "system")
        found.append({"role": role, "content": content})
    return found


def _check_last(messages: Messages, key: str, *, assistant: bool) -> None:
    role = messages[-1]["role"]
    if assistant != (role == "assistant"):
        rule = "must end with the assistant" if assistant else "must not end with the assistant"
        raise ValueError(f"{key} ends with {role}, {rule}")


def _string(row: Mapping[str, Any], key: str) -> str:
    return _check_string(row[key], key)


def _label(row: Mapping[str, Any], key: str) -> str:
    value = row.get(key)
    return "" if value is None else _check_string(value, key, empty=True)


def _check_string(value: Any, key: str, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{key} is {_shown(value)}, must be a string")
    if not empty and not value.strip():
        raise ValueError(f"{key} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} holds half a surrogate pair at character {error.start}") from error
    return value


def _shown(value: Any) -> str:
    """Say what a value is: its type, and itself where that is short."""
    if value is None:
        return "null"
    shown = repr(value)
    return f"{type(value).__name__} {shown}" if len(shown) <= 40 else type(value).__name__


def _describe_missing(row: Any, text_key: str) -> str:
    if not isinstance(row, Mapping):
        return f"{_shown(row)}, must be an object"
    have = ", ".join(map(str, row)) or "none"
    return (
        f"columns {have}; there must be {text_key}, messages, prompt+completion, "
        "prompt+chosen+rejected, or prompt+answer"
    )
