"""A process that runs one reward function for another process, one response per line.

It reads JSON lines and answers with JSON lines; what the function prints goes to standard error. It may hang, crash or be
killed at any time: `pool.py` starts another one. No torch in here, so that it starts at once.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any


def load(name: str) -> Callable[..., Any]:
    """Import `module:function`.

    Raises:
        ImportError: there is no such module, or no such function in it.
    """
    module_name, _, attribute = name.partition(":")
    module = importlib.import_module(module_name)
    function = getattr(module, attribute, None)
    if not callable(function):
        raise ImportError(f"module {module_name} has no function {attribute}")
    return function


def needed(function: Callable[..., Any]) -> list[str]:
    """List the parameters that `function` cannot be called without."""
    fixed = inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in fixed]


def call(function: Callable[..., Any], sample: Mapping[str, Any]) -> float:
    """Call `function` on one sample, by the names of its parameters.

    A function with a parameter `completions` is called as TRL calls it: every argument is a list (of one), prompts and
    completions are texts where the data's prompt is a text, else lists of messages.
    """
    parameters = inspect.signature(function).parameters
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if "completions" in parameters:
        asked, said = sample["prompt"], sample["response"]
        if not sample["is_text"]:
            asked, said = sample["messages"], [{"role": "assistant", "content": said}]
        given = {"prompts": [asked], "completions": [said], "answer": [sample["answer"]]}
        given |= {k: [v] for k, v in sample["extra"].items()}
        found = list(function(**{k: v for k, v in given.items() if takes_all or k in parameters}))
        if len(found) != 1:
            raise ValueError(f"{len(found)} rewards were returned for one completion")
        value = found[0]
    else:
        given = {k: v for k, v in sample.items() if k not in ("extra", "is_text")}
        given |= dict(sample["extra"])
        value = function(**{k: v for k, v in given.items() if takes_all or k in parameters})
    return math.nan if value is None else float(value)


def main() -> None:
    """Serve until standard input ends.

    Arguments: the function, keyword arguments as JSON that it is bound to, and modules to import before the clock runs.
    """
    from distllm.train.signals import die_with_parent

    die_with_parent(parent_pid=int(os.environ["DISTLLM_REWARD_PARENT"]))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**message: Any) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        function = load(sys.argv[1])
        for module in sys.argv[3:]:
            importlib.import_module(module)
        bound = json.loads(sys.argv[2])
        needs = [p for p in needed(function) if p not in bound]
    except BaseException as error:  # whatever the user's module does at import
        answer(error=f"{type(error).__name__}: {error}")
        return
    answer(ready=True, needs=needs)
    for line in sys.stdin:
        try:
            answer(value=call(function, json.loads(line) | bound))
        except Exception as error:
            answer(error=" ".join(f"{type(error).__name__}: {error}".split())[:500])


if __name__ == "__main__":
    main()
