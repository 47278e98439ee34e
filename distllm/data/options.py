"""Options of every data source. Each source reads the fields it needs and says so in its own
docstring."""

from dataclasses import dataclass, field
from enum import StrEnum


class OnBadLine(StrEnum):
    """What to do with a record that cannot be used."""

    ERROR = "error"
    SKIP = "skip"


class OnLong(StrEnum):
    """What to do with a record that is too long."""

    ERROR = "error"
    SKIP = "skip"
    CUT = "cut"


class Units(StrEnum):
    """What a tokenizer that is trained for a run takes as one token."""

    BPE = "bpe"
    WORD = "word"
    CHARACTER = "character"


class HeldoutBy(StrEnum):
    """How held-out content is chosen where no file is given for it."""

    HASH = "hash"
    END = "end"


@dataclass(kw_only=True, slots=True)
class MixPart:
    """One part of a mixture."""

    path: str
    """As `data.path`."""
    weight: float = 0.0
    """Share of the samples, relative to the other parts' weights; a part smaller than its share comes
    round more often. All 0: each part counts by its number of samples."""
    limit: int = 0
    """Read no more than this many records; 0 reads all."""
    columns: dict[str, str] = field(default_factory=dict)
    """As `data.columns`; empty takes that."""


@dataclass(kw_only=True, slots=True)
class DataOptions:
    """Where the records come from."""

    name: str = "stdlib"
    """Source: `stdlib` (documentation that Python carries), `skills` (generated chat tasks), `file`, `shards`
    (tokenised beforehand)."""
    path: str | None = None
    """data=file: a file, a folder, or a pattern such as `corpus/*.jsonl` (.jsonl, .json, .csv, .tsv,
    .parquet, .arrow, .txt, .conll; .gz and .zst too), or `hub:ORG/NAME` for a data set of the Hugging
    Face hub (`?config=C&split=S&revision=R&streaming=true` may follow). data=shards: the folder they were written to."""
    heldout_path: str | None = None
    """data=file: held-out records; left out, `heldout_fraction` of `path` is held out by hash of
    the content."""
    mix: list[MixPart] = field(default_factory=list)
    """data=file, data=shards: several paths in place of `path`, each with its weight, limit and columns."""
    limit: int = 0
    """data=file: read no more than this many records of `path`; 0 reads all."""
    columns: dict[str, str] = field(default_factory=dict)
    """data=file: names of ours -> names in the file, such as {prompt: question, completion: answer}."""
    verify: bool = True
    """data=shards: compare every file with its checksum before the run begins (processes share the work); false
    trusts sizes alone."""
    heldout_fraction: float = 0.05
    """Share of the content that is kept out of training; which content depends on its hash alone,
    not on the seed."""
    heldout_by: HeldoutBy = HeldoutBy.HASH
    """data=file: `hash` holds out by content; `end` takes the last share of the records, or of the characters of a
    text that is one document."""
    units: Units = Units.BPE
    """What a tokenizer that is trained for the run takes as one token: `bpe` pieces of bytes, `word` what stands between
    spaces (a line's end is a word), `character`. The last two know only what training holds; the rest is `<unk>`."""
    on_bad_line: OnBadLine = OnBadLine.ERROR
    """data=file: `error` stops at records that cannot be used, `skip` drops and counts them."""
    text_key: str = "text"
    """data=file: the column that holds a document's text."""
    document_separator: str = "\\n\\n"
    """data=file, .txt: what stands between two documents (`\\n` means a line's end); empty makes a
    file one document."""
    chat_template: str = ""
    """Chat template to use instead of the tokenizer's own, and to save with the model: a name (alpaca, chatml,
    gemma, llama2, llama3, mistral, phi3, raw, vicuna, zephyr) or a Jinja file. `raw` adds nothing but the end of
    text."""
    line_pattern: str = ""
    """data=file, .txt: a regular expression that makes a record of each line; its named groups are the
    columns, as in `(?P<label>\\S+) (?P<text>.+)`. Empty: the text is cut into documents."""
    csv_quotes: bool = True
    """data=file, .csv and .tsv: whether a quotation mark opens a field that may hold the separator and
    line ends; false takes it as text."""
    answer_after: str = ""
    """data=file: the answer to a prompt is what stands behind the last of these words (GSM8K: `####`), in the `answer`
    column or the completion, and so in a response that is compared with it; what is learned from stays whole."""
    on_long: OnLong = OnLong.ERROR
    """What to do with a record of more tokens than `train.seq_len`: `error` stops, `skip` leaves it out,
    `cut` keeps the beginning of a dialogue (no end is invented) and leaves out longer pairs and prompts."""
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
