"""Records from files on disk. `readers.py` turns files into rows, `rows.py` turns rows into records."""

from __future__ import annotations

from distllm.data.source import Source
from distllm.registry import register


@register("data")
class FileSource(Source):
    """Records of `data.path`."""

    serves = ("documents", "dialogues", "pairs", "prompts")
