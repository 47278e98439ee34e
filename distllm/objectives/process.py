"""Process rewards: judge each step of a solution, at the step's last token, as right or wrong.

    loss = - sum over steps of log p(label of the step | prompt and steps up to it)

Reference: Lightman et al. 2023, arXiv 2305.20050, section 2.6 (a classifier at the end of each step, without the class
for neutral steps); Uesato et al. 2022, arXiv 2211.14275.
"""

from __future__ import annotations

from dataclasses import dataclass

from distllm.objectives.tag import Tag
from distllm.registry import register


@dataclass(kw_only=True, slots=True)
class ProcessOptions:
    """Learn to judge the steps of solutions."""

    name: str = "process"


@register("objective")
class Process(Tag):
    """Cross-entropy in nats, summed over steps; weight: their number."""

    Options = ProcessOptions
    records = "stepwise"
