"""`distllm chat`: talk to a model in the terminal, or answer the lines of a pipe."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

from distllm.cli import speaker
from distllm.cli.arguments import split

HELP = """
usage: distllm chat model=DIR [system=TEXT] [temperature=T] [max_new_tokens=N] [key=value ...]

Answers appear as they are written and see the whole conversation. When it no longer fits the
model, the oldest turns are dropped. /reset starts anew, /exit or Ctrl-D ends, Ctrl-C cuts an answer
short. Lines may also come from a pipe: each is one message, and only answers go to stdout.

Examples:
  distllm chat model=runs/demo/grpo/model
  printf 'Sort the digits: 3 1 2\\n' | distllm chat model=runs/demo/grpo/model temperature=0
"""
OWN = {"system": "a system message that stands before the conversation"} | speaker.OWN


def run(arguments: Sequence[str]) -> int:
    """Run the conversation until the user ends it."""
    given = split("chat", arguments, OWN)

    from distllm.errors import ConfigError

    voice = speaker.load("chat", given, OWN)
    if voice.tokenizer.chat_template is None:
        raise ConfigError(
            "`distllm chat` needs a tokenizer with a chat template, and this one has none. "
            "Use `distllm generate`, or set tokenizer=DIR to one that has."
        )
    conversation = Conversation(voice, given.own.get("system", ""))
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        _say("/reset starts anew, /exit or Ctrl-D ends, Ctrl-C cuts an answer short.")
    read = _line_of_terminal if interactive else _line_of_pipe
    while (line := read()) is not None:
        message = line.strip()
        if message == "/exit":
            break
        if message == "/reset":
            conversation.reset()
            _say("The conversation starts anew.")
        elif message:
            conversation.answer(message, _write)
    return 0


class Conversation:
    """The messages so far and the model that answers them."""

    def __init__(self, voice: speaker.Speaker, system: str = "") -> None:
        self.voice = voice
        self.system = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = []
        """User and assistant in turns; the system message stands apart: it is never dropped."""
        self.num_answers = 0

    def reset(self) -> None:
        """Forget all messages."""
        self.messages = []

    def answer(self, message: str, write: Callable[[str], Any]) -> None:
        """Answer `message`, handing text to `write` as it comes, and remember both.

        A message that cannot be answered is reported and forgotten.
        """
        from distllm.errors import DataError
        from distllm.generation.text import TextStream

        self.messages.append({"role": "user", "content": message})
        try:
            prompt_ids = self._fit()
        except DataError as error:
            self.messages.pop()
            _say(str(error))
            return
        text, parts, last = TextStream(self.voice.tokenizer), [], None
        self.num_answers += 1
        try:
            for last in self.voice.stream(prompt_ids, self.num_answers):
                parts.append(text.push(last))
                write(parts[-1])
        except KeyboardInterrupt:
            _say("\nThe answer was cut short.")
        parts.append(text.flush())
        write(parts[-1] + "\n")
        self.messages.append({"role": "assistant", "content": "".join(parts)})

    def _fit(self) -> list[int]:
        """Encode the conversation, dropping its oldest turns until there is room for an answer.

        Raises:
            DataError: the newest message alone is too long.
        """
        from distllm.data.chat import encode_prompt
        from distllm.errors import DataError

        context = self.voice.max_seq_len
        room = min(self.voice.options.max_new_tokens, context // 2)
        num_dropped = 0
        while True:
            prompt_ids = encode_prompt(self.voice.tokenizer, self.system + self.messages)
            if len(prompt_ids) + room <= context:
                break
            if len(self.messages) < 3:
                raise DataError(
                    f"The message takes {len(prompt_ids)} tokens; with {room} for the answer the "
                    f"model reads at most {context}. Send {len(prompt_ids) + room - context} less."
                )
            self.messages = self.messages[2:]
            num_dropped += 1
        if num_dropped:
            what = "question and answer" if num_dropped == 1 else "questions and answers"
            _say(
                f"(The conversation no longer fits the model's {context} tokens. "
                f"Dropped: the {num_dropped} oldest {what}.)"
            )
        return prompt_ids


def _line_of_terminal() -> str | None:
    """Ask for a line; None at the end of input."""
    import readline  # noqa: F401  (gives input() a history and line editing)

    try:
        return input("\nyou> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _line_of_pipe() -> str | None:
    line = sys.stdin.buffer.readline().decode("utf-8", errors="replace")
    return line or None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _say(text: str) -> None:
    """Tell the user something that is no answer: to stderr, so that a pipe holds answers only."""
    print(text, file=sys.stderr, flush=True)
