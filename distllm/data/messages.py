"""Conversations in the forms that files hold them in, turned into one: a list of role and content.

Read are OpenAI's `{"role", "content"}`, ShareGPT's `{"from", "value"}` and transcripts with
`Human:` and `Assistant:` turns. Whatever cannot be kept (tool calls, images) is refused. All
functions raise ValueError with the reason, naming the column.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from typing import Any

Messages = list[dict[str, str]]

_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Names of other formats -> ours."""
_KNOWN_ROLES = (
    "assistant",
    "developer",
    "environment",
    "function",
    "ipython",
    "system",
    "tool",
    "user",
)
"""What templates know; any other name is refused, for a template may leave its message out without a word."""

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def read_messages(value: Any, key: str) -> Messages:
    """Read a conversation: a list of messages, or a transcript."""
    if isinstance(value, str) and is_transcript(value):
        return _transcript(value, key)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{key} is {shown(value)}, must be a list of messages")
    return [_message(message, f"{key}[{n}]") for n, message in enumerate(value, start=1)]


def learned_messages(value: Any, messages: Messages) -> list[int] | None:
    """Return the assistant's messages to learn from where messages say so, else None.

    A message says so with `weight` 0 or 1 (OpenAI) or `train` true or false (axolotl).
    """
    if not isinstance(value, list) or not any(
        m.get("weight") is not None or m.get("train") is not None for m in value
    ):
        return None
    found = [
        i
        for i, (given, message) in enumerate(zip(value, messages, strict=True))
        if message["role"] == "assistant"
        and given.get("weight") in (None, 1)
        and given.get("train") in (None, True)
    ]
    if not found:
        raise ValueError("no message of the assistant has a weight above 0")
    return found


def read_prompt(value: Any, key: str) -> Messages:
    """Read a prompt: what the user says, or messages that do not end with the assistant."""
    if isinstance(value, str) and is_transcript(value):
        value = re.sub(r"\n\nAssistant:\s*$", "", value)
    elif not isinstance(value, list | Mapping):
        return [{"role": "user", "content": check_string(value, key)}]
    messages = read_messages(value, key)
    check_last(messages, key, assistant=False)
    return messages


def read_answers(prompt: Messages, value: Any, key: str) -> Messages:
    """Read what follows a prompt: a string, the assistant's messages, or the prompt with them."""
    if isinstance(value, str) and not is_transcript(value):
        return [{"role": "assistant", "content": check_string(value, key)}]
    if not isinstance(value, str | list | Mapping):
        check_string(value, key)
    messages = read_messages(value, key)
    check_last(messages, key, assistant=True)
    if messages[: len(prompt)] == prompt:
        messages = messages[len(prompt) :]
    if messages[0]["role"] != "assistant":
        raise ValueError(f"{key} is a conversation that does not begin with the prompt")
    return messages


def read_answer(prompt: Messages, value: Any, key: str) -> str:
    """Read a single answer to a prompt."""
    messages = read_answers(prompt, value, key)
    if len(messages) > 1:
        raise ValueError(f"{key} holds {len(messages)} messages after the prompt, must hold one")
    return messages[0]["content"]


def split_prompt(chosen: Any, rejected: Any) -> tuple[Messages, Any, Any]:
    """Find the prompt that a pair without one implies; return it, and what follows it on either side.

    Two conversations share all messages but the last of each, two texts the words that they begin with.
    """
    if is_text(chosen) and is_text(rejected):
        same = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False)
        )
        shared = "".join(character for character, _ in same)
        while shared and not shared[-1].isspace():  # a word that only begins alike is the answers'
            shared = shared[:-1]
        if chosen == rejected:
            raise ValueError(f"chosen and rejected are the same: {chosen[:50]!r}")
        if not shared.strip():
            raise ValueError(
                "there is no prompt, and chosen and rejected do not begin with the same words"
            )
        prompt = [{"role": "user", "content": shared.strip()}]
        return prompt, chosen[len(shared) :], rejected[len(shared) :]
    for value in (chosen, rejected):
        if not isinstance(value, list | str) or is_text(value):
            raise ValueError(
                "there is no prompt, and chosen and rejected are neither two whole conversations nor two texts"
            )
    prompt = read_messages(chosen, "chosen")[:-1]
    if not prompt or prompt != read_messages(rejected, "rejected")[:-1]:
        raise ValueError(
            "there is no prompt, and chosen and rejected differ before their last message"
        )
    check_last(prompt, "chosen without its last message", assistant=False)
    return prompt, chosen, rejected


def is_transcript(text: str) -> bool:
    """Say whether a text is a conversation written as `Human: ...`, `Assistant: ...`."""
    found = _TURN.match(text)
    return found is not None and found[1] == "Human"


def is_text(prompt: Any) -> bool:
    """Say whether a prompt is what the user says, not messages or a transcript of them."""
    return isinstance(prompt, str) and not is_transcript(prompt)


def check_last(messages: Messages, key: str, *, assistant: bool) -> None:
    """Refuse a conversation whose last message is the wrong side's."""
    role = messages[-1]["role"]
    if assistant != (role == "assistant"):
        rule = "must end with the assistant" if assistant else "must not end with the assistant"
        raise ValueError(f"{key} ends with {role}, {rule}")


def check_string(value: Any, key: str, *, empty: bool = False) -> str:
    """Refuse what is not a string of characters that can be written; by default also an empty one."""
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shown(value)}, must be a string")
    if not empty and not value.strip():
        raise ValueError(f"{key} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{key} holds half a surrogate pair at character {error.start}") from error
    return value


def shown(value: Any) -> str:
    """Say what a value is: its type, and itself where that is short."""
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 40 else type(value).__name__


def _message(message: Any, where: str) -> dict[str, str]:
    if not isinstance(message, Mapping):
        raise ValueError(f"{where} is {shown(message)}, must be an object with role and content")
    role_key, content_key = ("from", "value") if message.get("from") else ("role", "content")
    role = check_string(message.get(role_key), f"{where}.{role_key}")
    role = _ROLES.get(role.lower(), role)
    if role not in _KNOWN_ROLES:
        names = ", ".join(sorted([*_KNOWN_ROLES, *_ROLES]))
        raise ValueError(f"{where}.{role_key} is {role!r}, must be one of {names}")
    if message.get("tool_calls"):
        raise ValueError(f"{where} holds tool_calls, which a text cannot keep")
    content = message.get(content_key)
    if isinstance(content, list):
        content = _joined(content, f"{where}.{content_key}")
    # Empty system prompts are common and harmless; an empty turn is neither.
    content = check_string(content, f"{where}.{content_key}", empty=role == "system")
    return {"role": role, "content": content}


def _joined(parts: list[Any], where: str) -> str:
    """Join the parts of a content, which must all be text."""
    texts = []
    for number, part in enumerate(parts, start=1):
        if isinstance(part, Mapping) and part.get("type") not in (None, "text"):
            raise ValueError(f"{where}[{number}] is {part['type']}, and only text can be used")
        text = part.get("text") if isinstance(part, Mapping) else part
        texts.append(check_string(text, f"{where}[{number}]", empty=True))
    return "".join(texts)


def _transcript(text: str, key: str) -> Messages:
    pieces = _TURN.split(text)
    messages = []
    for number, (who, said) in enumerate(zip(pieces[1::2], pieces[2::2], strict=True), start=1):
        content = check_string(said.strip(), f"{key}, turn {number} ({who})")
        messages.append({"role": _ROLES.get(who.lower(), who.lower()), "content": content})
    return messages
