"""`distllm explain KEY`: a setting's value, where it comes from, its type and what it means."""

import json
from collections.abc import Sequence
from typing import Any

from distllm.cli.arguments import split

HELP = """
usage: distllm explain KEY [key=value ...]
       distllm explain GROUP [key=value ...]
       distllm explain
       distllm explain stage=grpo

KEY is a dotted setting such as optim.lr; GROUP lists all settings of arch, stage, train, ...
Overrides choose options: distllm explain stage stage=ppo
A stage alone prints its equation, where each default comes from, and where other frameworks differ.
"""
OWN: dict[str, str] = {}


def run(arguments: Sequence[str]) -> int:
    """Print one setting in full, or a table of many."""
    given = split("explain", arguments, OWN, names="a setting or a group", max_names=1)

    from distllm.cli.card import card_of, print_card
    from distllm.config.origins import explain

    if not given.names and len(given.overrides) == 1:
        key, _, value = given.overrides[0].partition("=")
        if key == "stage" and (found := card_of(value)):
            print_card(value, *found)
            return 0

    found = explain(*given.names, arguments=given.overrides)
    if len(found) == 1:
        one = found[0]
        print(f"{one.key}={_show(one.value)}")
        for label in ("origin", "default", "type", "meaning", "resume"):
            print(f"  {label + ':':<9} {_show(getattr(one, label))}")
        return 0
    width = max(len(e.key) + 1 + len(_show(e.value)) for e in found)
    for one in found:
        print(f"{f'{one.key}={_show(one.value)}':<{min(width, 48)}}  {one.meaning}")
    return 0


def _show(value: Any) -> str:
    return str(value) if isinstance(value, str) else json.dumps(value, default=str)
