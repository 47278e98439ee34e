"""Options of every data source. Each source reads the fields it needs and says so in its own
docstring."""

from dataclasses import dataclass, field
from enum import StrEnum


class OnBadLine(StrEnum):
    """What to do with a record that cannot be used."""

    ERROR = "error"
    SKIP = "skip"


@dataclass(kw_only=True, slots=True)
class DataOptions:
    """Where the records come from."""

    name: str = "stdlib"
    """Source: `stdlib` (documentation that Python carries), `skills` (generated chat tasks),
    `file`."""
    path: str | None = None
    """data=file: a file, a folder, or a pattern such as `corpus/*.jsonl` (.txt, .jsonl, .json,
    .parquet; .gz too)."""
    heldout_path: str | None = None
    """data=file: held-out records; left out, `heldout_fraction` of `path` is held out by hash of
    the content."""
    heldout_fraction: float = 0.05
    """Share of the content that is kept out of training; which content depends on its hash alone,
    not on the seed."""
    on_bad_line: OnBadLine = OnBadLine.ERROR
    """data=file: `error` stops at records that cannot be used, `skip` drops and counts them."""
    text_key: str = "text"
    """data=file: the column that holds a document's text."""
    document_separator: str = "\\n\\n"
    """data=file, .txt: what stands between two documents (`\\n` means a line's end); empty makes a
    file one document."""
    tasks: list[str] = field(default_factory=list)
    """data=skills: which tasks to generate; empty means all."""
    num_train: int = 8000
    """data=skills: number of training dialogues (and of training pairs)."""
    num_prompts: int = 16000
    """data=skills: number of prompts to practise on with RL; the first `num_train` are those of the
    dialogues."""
    num_heldout: int = 400
    """data=skills: number of held-out dialogues, pairs and prompts; no prompt occurs twice among
    them."""
