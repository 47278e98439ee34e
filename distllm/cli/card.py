"""Prints an algorithm's card: `distllm explain stage=grpo`."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from typing import Any

from distllm import registry
from distllm.rl.card import Card

WIDTH = 110


def card_of(stage: str) -> tuple[Card, Any] | None:
    """Return the card and the options of a stage that has a card."""
    for group in ("algorithm", "objective"):
        if stage in registry.names(group):
            cls: Any = registry.get(group, stage)
            if card := getattr(cls, "card", None):
                return card, cls.Options(name=stage)
    return None


def print_card(stage: str, card: Card, options: Any) -> None:
    """Print what the stage computes, where its defaults come from, and who differs."""
    print(f"stage={stage}: {card.paper}\n")
    print(textwrap.indent(card.equation.strip("\n"), "  "))
    print(
        "  (l: log-probability of a sampled token; _old: before the update; _ref: under the reference)\n"
    )
    print("Expected gradient")
    print(textwrap.fill(card.expectation, WIDTH, initial_indent="  ", subsequent_indent="  "))
    print("\nDefaults and where they come from")
    shown = [(f.name, _show(getattr(options, f.name))) for f in fields(options) if f.name != "name"]
    width = max(len(name) + 1 + len(value) for name, value in shown)
    for name, value in shown:
        print(f"  {f'{name}={value}':<{width}}  {card.source(name)}")
    print("\nOthers under the same name")
    for who, what in card.differences.items():
        first = f"  {who}: "
        print(textwrap.fill(what, WIDTH, initial_indent=first, subsequent_indent="    "))
    print("\n`distllm explain stage.KEY stage=" + stage + "` tells what a setting means.")


def _show(value: Any) -> str:
    return '""' if value == "" else str(value).lower() if isinstance(value, bool) else str(value)
