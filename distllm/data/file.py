"""Records from files on disk: `readers.py` makes rows of files, `rows.py` records of rows."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

from distllm.data.options import DataOptions, OnBadLine
from distllm.data.readers import Row, find_files, kind_of, read_rows, read_text
from distllm.data.rows import content_key, form_of, to_record
from distllm.data.source import KINDS, Source, check_split, heldout_flags, records_fingerprint
from distllm.errors import ConfigError, DataError
from distllm.registry import register
from distllm.types import Dialogue, Document, Pair, Prompt, Record

R = TypeVar("R", Document, Pair)

_SERVED_BY = {
    Document: ("documents",),
    Dialogue: ("dialogues", "prompts"),
    Pair: ("pairs", "prompts"),
    Prompt: ("prompts", "dialogues"),
}
"""What can be made of each record; what it is comes first."""


@register("data")
class FileSource(Source):
    """Records of `data.path`; the columns decide what they are (see `rows.py`).

    A .txt file is cut into documents at `data.document_separator`. Held out is `data.heldout_path`,
    or else the records whose content hashes below `data.heldout_fraction`; copies of one prompt
    always fall on the same side.
    """

    def __init__(self, options: DataOptions, seed: int) -> None:
        super().__init__(options, seed)
        if not options.path:
            raise ConfigError("data=file needs data.path=FILE (or a folder, or a pattern).")
        self._splits: dict[str, list[Record]] | None = None

    @property
    def serves(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Say what can be made of the records, which are read for it."""
        records = self._load()["train"] or self._load()["heldout"]
        served = _SERVED_BY[type(records[0])]
        if any(isinstance(r, Prompt) and r.answer is None for r in records):
            return served[:1]
        return served

    @property
    def checkable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Say whether all records are prompts with an answer."""
        both = self._load()
        return all(isinstance(r, Prompt) and r.answer for r in both["train"] + both["heldout"])

    def documents(self, split: str) -> list[Document]:
        """Return the texts."""
        return [self._expect(r, Document, "documents") for r in self._records(split)]

    def dialogues(self, split: str) -> list[Dialogue]:
        """Return the conversations; a prompt with its answer is one too."""
        return [_as_dialogue(r) or self._refuse(r, "dialogues") for r in self._records(split)]

    def pairs(self, split: str) -> list[Pair]:
        """Return the preference pairs."""
        return [self._expect(r, Pair, "pairs") for r in self._records(split)]

    def prompts(self, split: str) -> list[Prompt]:
        """Return the prompts; a conversation's is all but its last message, which is the answer."""
        return [_as_prompt(r) or self._refuse(r, "prompts") for r in self._records(split)]

    def fingerprint(self) -> str:
        """Hash all records (sha256, hex)."""
        splits = self._load()
        return records_fingerprint([*splits["train"], *splits["heldout"]])

    def _records(self, split: str) -> list[Record]:
        check_split(split)
        found = self._load()[split]
        if not found:
            raise DataError(
                f"data.path={self.options.path} leaves nothing in split {split} with "
                f"data.heldout_fraction={self.options.heldout_fraction}. Set "
                "data.heldout_path=FILE, or another fraction."
            )
        return found

    def _load(self) -> dict[str, list[Record]]:
        if self._splits is None:
            records = self._read(str(self.options.path), "data.path")
            keys = [content_key(r) for r in records]
            if self.options.heldout_path:
                held = self._read(self.options.heldout_path, "data.heldout_path")
                _warn_of_overlap(set(keys), held)
                self._splits = {"train": records, "heldout": held}
            else:
                flags = heldout_flags(keys, self.options.heldout_fraction)
                both = list(zip(records, flags, strict=True))
                self._splits = {
                    "train": [r for r, flag in both if not flag],
                    "heldout": [r for r, flag in both if flag],
                }
        return self._splits

    def _read(self, path: str, setting: str) -> list[Record]:
        """Read all records of one setting, refusing or skipping the bad ones as the options say."""
        records: list[Record] = []
        bad: list[tuple[Row, str]] = []
        forms: dict[str, str] = {}
        for file in find_files(path, setting):
            if kind_of(file) == ".txt":
                records += self._texts(file)
                forms.setdefault(self.options.text_key, f"{file}")
                continue
            for row in read_rows(file):
                try:
                    if row.problem:
                        raise ValueError(row.problem)
                    records.append(to_record(row.value, self.options.text_key))
                except ValueError as error:
                    bad.append((row, str(error)))
                else:
                    form = form_of(row.value, self.options.text_key)
                    forms.setdefault(str(form), f"{file} {row.place}")
        total = len(records) + len(bad)
        if bad:
            first, reason = bad[0]
            what = (
                f"{len(bad)} of {total} records in {setting}={path} cannot be used; the first is "
                f"{first.file} {first.place}: {reason}."
            )
            if not records:
                raise DataError(f"{what} None is left.")
            if self.options.on_bad_line == OnBadLine.ERROR:
                raise DataError(f"{what} Fix them, or set data.on_bad_line=skip to leave them out.")
            warnings.warn(f"{what} They are left out (data.on_bad_line=skip).", stacklevel=2)
        if not records:
            raise DataError(f"{setting}={path} holds no record.")
        if len({type(r) for r in records}) > 1:
            seen = "; ".join(f"{form} ({place})" for form, place in forms.items())
            raise DataError(
                f"{setting}={path} mixes records of different columns: {seen}. Split the file."
            )
        return records

    def _texts(self, file: Path) -> Iterator[Document]:
        """Cut a text file into its documents."""
        text = read_text(file)
        separator = self.options.document_separator.replace("\\n", "\n")
        parts = text.split(separator) if separator else [text]
        kept = [part.strip("\n") for part in parts if part.strip()]
        return (
            Document(text=part, name=f"{file.name}#{i}") for i, part in enumerate(kept, start=1)
        )

    def _expect(self, record: Record, kind: type[R], wanted: str) -> R:
        return record if isinstance(record, kind) else self._refuse(record, wanted)

    def _refuse(self, record: Record, wanted: str) -> NoReturn:
        held = _SERVED_BY[type(record)][0]
        lack = " without answers" if isinstance(record, Prompt) and record.answer is None else ""
        raise ConfigError(
            f"data.path={self.options.path} holds {held}{lack}, from which {wanted} "
            f"({KINDS[wanted]}) cannot be made. Set data.path to a file with other columns, or a "
            f"stage that learns from {held} ({KINDS[held]})."
        )


def _as_dialogue(record: Record) -> Dialogue | None:
    """See a record as a conversation, if it is one or holds the answer to its prompt."""
    if isinstance(record, Prompt) and record.answer is not None:
        answer = {"role": "assistant", "content": record.answer}
        return Dialogue(messages=[*record.messages, answer], task=record.task)
    return record if isinstance(record, Dialogue) else None


def _as_prompt(record: Record) -> Prompt | None:
    """See a record as something to answer."""
    match record:
        case Prompt():
            return record
        case Dialogue(messages=[*asked, last]) if asked and asked[-1]["role"] != "assistant":
            return Prompt(messages=asked, answer=last["content"], task=record.task)
        case Pair():
            return Prompt(messages=record.prompt, task=record.task)
    return None


def _warn_of_overlap(train_keys: set[str], held: list[Record]) -> None:
    """Say how much of a held-out file is also in the training file."""
    shared = sum(content_key(r) in train_keys for r in held)
    if shared:
        warnings.warn(
            f"{shared} of {len(held)} records in data.heldout_path are also in data.path: what is "
            "measured on them is partly memory.",
            stacklevel=2,
        )
