"""Records from files on disk or the hub, split into training and held out.

`readers.py` and `tables.py` make rows of files, `rows.py` records of rows, `intake.py` joins them.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from typing import NoReturn, TypeVar

from distllm.data.intake import Intake, intakes
from distllm.data.mixture import Records
from distllm.data.options import DataOptions, HeldoutBy, OnBadLine
from distllm.data.rows import content_key, texts_of
from distllm.data.source import (
    KINDS,
    Source,
    both_answers,
    check_split,
    final_answer,
    heldout_flags,
    records_fingerprint,
)
from distllm.data.tail import cut_end
from distllm.errors import ConfigError, DataError
from distllm.registry import register
from distllm.types import (
    ComparedPair,
    Dialogue,
    Document,
    Labelled,
    Pair,
    Parallel,
    Prompt,
    Record,
    Stepwise,
    Tagged,
    Unpaired,
)

_log = logging.getLogger("distllm")

R = TypeVar("R", bound=Record)

SERVED_BY: dict[type, tuple[str, ...]] = {
    Document: ("documents",),
    Dialogue: ("dialogues", "prompts"),
    Pair: ("pairs", "unpaired", "prompts"),
    ComparedPair: ("compared", "pairs", "unpaired", "prompts"),
    Prompt: ("prompts", "dialogues"),
    Unpaired: ("unpaired", "prompts"),
    Labelled: ("labelled", "documents"),
    Tagged: ("tagged",),
    Stepwise: ("stepwise",),
    Parallel: ("parallel", "dialogues", "prompts"),
}
"""What can be made of each record; what it is comes first."""


def served_by(records: Iterable[Record]) -> tuple[str, ...]:
    """Say what can be made of records of one kind; prompts without an answer are no dialogues."""
    kinds: tuple[str, ...] = ()
    for record in records:
        kinds = kinds or SERVED_BY[type(record)]
        if not isinstance(record, Prompt):
            break
        if record.answer is None:
            return kinds[:1]
    return kinds


@register("data")
class FileSource(Source):
    """Records of `data.path` or `data.mix`; the columns decide what they are (see `rows.py`).

    A .txt file is cut into documents at `data.document_separator`. Held out is `data.heldout_path`,
    or else the records whose content hashes below `data.heldout_fraction` (copies of one prompt
    always fall on the same side), or the end of them with `data.heldout_by=end`.
    """

    def __init__(self, options: DataOptions, seed: int) -> None:
        super().__init__(options, seed)
        self._intakes = intakes(options)
        self._splits: dict[str, Records] | None = None

    @property
    def serves(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Say what can be made of the records, which are read for it."""
        return served_by(self._load()["train"] or self._load()["heldout"])

    @property
    def checkable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Say whether all records are questions with one right answer."""
        both = self._load()
        return all(
            isinstance(r, Parallel)
            or (isinstance(r, Prompt) and r.answer)
            or (isinstance(r, Dialogue) and self.options.answer_after)
            for r in [*both["train"], *both["heldout"]]
        )

    def documents(self, split: str) -> list[Document]:
        """Return the texts; those of labelled texts are texts too."""
        return self._each(split, _as_document, "documents")

    def dialogues(self, split: str) -> list[Dialogue]:
        """Return the conversations; a prompt with its answer is one too."""
        return self._each(split, _as_dialogue, "dialogues")

    def pairs(self, split: str) -> list[Pair]:
        """Return the preference pairs."""
        return self._each(split, _only(Pair), "pairs")

    def compared(self, split: str) -> list[ComparedPair]:
        """Return the pairs that several objectives compare."""
        return self._each(split, _only(ComparedPair), "compared")

    def prompts(self, split: str) -> list[Prompt]:
        """Return the prompts; a conversation's is all but its last message, which is the answer."""
        marker = self.options.answer_after
        prompts = self._each(split, _as_prompt, "prompts")
        for prompt in prompts if marker else ():
            prompt.answer = prompt.answer and final_answer(prompt.answer, marker)
        return prompts

    def texts(self) -> list[str]:
        """Return all that is said in the training records."""
        return [text for record in self._records("train") for text in texts_of(record)]

    def unpaired(self, split: str) -> list[Unpaired]:
        """Return answers judged good or bad; a pair gives one of each."""
        records = self._records(split)
        if all(isinstance(r, Pair) for r in records):
            return records.spread(both_answers)
        return self._each(split, _only(Unpaired), "unpaired")

    def labelled(self, split: str) -> list[Labelled]:
        """Return texts with their classes."""
        return self._each(split, _only(Labelled), "labelled")

    def tagged(self, split: str) -> list[Tagged]:
        """Return sentences with a tag for each word."""
        return self._each(split, _only(Tagged), "tagged")

    def stepwise(self, split: str) -> list[Stepwise]:
        """Return solutions with a verdict for each step."""
        return self._each(split, _only(Stepwise), "stepwise")

    def parallel(self, split: str) -> list[Parallel]:
        """Return texts with what they become."""
        return self._each(split, _only(Parallel), "parallel")

    def fingerprint(self) -> str:
        """Hash all records (sha256, hex)."""
        splits = self._load()
        return records_fingerprint([*splits["train"], *splits["heldout"]])

    def _each(self, split: str, change: object, wanted: str) -> list:
        assert callable(change)
        return self._records(split).spread(lambda r: [change(r) or self._refuse(r, wanted)])

    def _records(self, split: str) -> Records:
        check_split(split)
        found = self._load()[split]
        if not found:
            raise DataError(
                f"data.path={self.options.path} leaves nothing in split {split} with "
                f"data.heldout_fraction={self.options.heldout_fraction}. Set "
                "data.heldout_path=FILE, or another fraction."
            )
        return found

    def _load(self) -> dict[str, Records]:
        if self._splits is None:
            parts = [(self._read(intake), weight) for intake, weight in self._intakes]
            check_one_kind(part[0] for part, _ in parts)
            if self.options.heldout_path:
                held = self._read(
                    Intake(
                        self.options.heldout_path,
                        "data.heldout_path",
                        self.options,
                        columns=self.options.columns,
                    )
                )
                keys = {content_key(r) for records, _ in parts for r in records}
                _warn_of_overlap(keys, held)
                self._splits = {"train": Records.join(parts), "heldout": Records(held)}
            elif self.options.heldout_by == HeldoutBy.END:
                cut = [
                    (cut_end(part, self.options.heldout_fraction), weight) for part, weight in parts
                ]
                self._splits = {
                    "train": Records.join([(start, weight) for (start, _), weight in cut]),
                    "heldout": Records([r for (_, end), _ in cut for r in end]),
                }
            else:
                records = [r for part, _ in parts for r in part]
                keys = [content_key(r) for r in records]
                flags = iter(heldout_flags(keys, self.options.heldout_fraction))
                sides: dict[str, list[tuple[list[Record], float]]] = {"train": [], "heldout": []}
                for part, weight in parts:
                    held_flags = [next(flags) for _ in part]
                    for side, wanted in (("train", False), ("heldout", True)):
                        kept = [r for r, f in zip(part, held_flags, strict=True) if f == wanted]
                        sides[side].append((kept, weight))
                self._splits = {
                    "train": Records.join(sides["train"]),
                    "heldout": Records([r for part, _ in sides["heldout"] for r in part]),
                }
        return self._splits

    def _read(self, intake: Intake) -> list[Record]:
        """Read all records of a path, refusing or skipping the bad ones as the options say."""
        records = list(intake)
        if intake.bad:
            what = intake.complaint()
            if not records:
                raise DataError(f"{what} None is left.")
            if self.options.on_bad_line == OnBadLine.ERROR:
                raise DataError(f"{what} Fix them, or set data.on_bad_line=skip to leave them out.")
            warnings.warn(f"{what} They are left out (data.on_bad_line=skip).", stacklevel=2)
        if not records:
            raise DataError(f"{intake.setting}={intake.path} holds no record.")
        intake.check_one_kind()
        _log.info("%s.", intake.describe())
        return records

    def _refuse(self, record: Record, wanted: str) -> NoReturn:
        held = SERVED_BY[type(record)][0]
        lack = " without answers" if isinstance(record, Prompt) and record.answer is None else ""
        raise ConfigError(
            f"data.path={self.options.path} holds {held}{lack}, from which {wanted} "
            f"({KINDS[wanted]}) cannot be made. Set data.path to a file with other columns, or a "
            f"stage that learns from {held} ({KINDS[held]})."
        )


def check_one_kind(firsts: Iterable[Record]) -> None:
    """Refuse a mixture whose parts hold records of different kinds.

    Args:
        firsts: the first record of each part.

    Raises:
        DataError: naming the kinds and where they were seen.
    """
    kinds = {type(record): record for record in firsts}
    if len(kinds) > 1:
        seen = "; ".join(f"{SERVED_BY[k][0]} ({r.place})" for k, r in kinds.items())
        raise DataError(f"data.mix mixes records of different kinds: {seen}.")


def _only(kind: type[R]):
    return lambda record: record if isinstance(record, kind) else None


def _as_document(record: Record) -> Document | None:
    if isinstance(record, Labelled):
        return Document(text="\n".join(record.texts), place=record.place)
    return record if isinstance(record, Document) else None


def _as_dialogue(record: Record) -> Dialogue | None:
    """See a record as a conversation, if it is one or holds the answer to its prompt."""
    match record:
        case Dialogue():
            return record
        case Prompt(answer=str(answer)):
            asked = record.messages
        case Parallel():
            asked, answer = [{"role": "user", "content": record.source}], record.target
        case _:
            return None
    messages = [*asked, {"role": "assistant", "content": answer}]
    return Dialogue(messages=messages, task=getattr(record, "task", ""), place=record.place)


def _as_prompt(record: Record) -> Prompt | None:
    """See a record as something to answer."""
    match record:
        case Prompt():
            return record
        case Dialogue(messages=[*asked, last]) if asked and asked[-1]["role"] != "assistant":
            return Prompt(
                messages=asked,
                answer=last["content"],
                task=record.task,
                is_text=record.is_text,
                place=record.place,
            )
        case Pair() | Unpaired():
            return Prompt(messages=record.prompt, task=record.task, place=record.place)
        case Parallel():
            asked = [{"role": "user", "content": record.source}]
            return Prompt(messages=asked, answer=record.target, place=record.place)
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
