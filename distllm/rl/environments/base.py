"""What an environment is: whoever answers the policy in the middle of its response, be it a tool, a user or a game.

Each kind is a file beside this one, named in `stage.environment`. How turns become one response is in `rl/conversation.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from distllm.types import Prompt


class Environment(Protocol):
    """Answers turn by turn. It keeps nothing between calls: all it knows is what was said so far."""

    stop: Sequence[str]
    """Texts that end a turn of the policy; a turn also ends with an end token, after which nothing is answered."""

    def reply(self, prompt: Prompt, said: Sequence[str]) -> str | None:
        """Answer the last text of `said`, which the policy and the environment wrote in turn, the policy first.

        Returns:
            the words that come next in the response, seen by the policy and never learned from; None ends the response.
        """
        ...
