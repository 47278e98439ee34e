"""From a path to records: reads rows, names their columns, decides what they are, checks each.

The first record of a file decides for the file. `file.py` splits what comes out into training and
held out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distllm.data.options import DataOptions, MixPart
from distllm.data.readers import ReadOptions, Row, find_files, kind_of, read_rows
from distllm.data.rows import Form, describe_missing, form_of
from distllm.data.tables import HUB, read_hub
from distllm.errors import ConfigError, DataError
from distllm.types import Dialogue, Document, Prompt, Record


@dataclass(slots=True)
class Decision:
    """What the first record of a file said it is."""

    form: Form
    place: str
    columns: list[str]
    """All columns of that record, as the file names them."""


@dataclass(slots=True)
class Intake:
    """The records of one path, in a stream; what was found out on the way stays here."""

    path: str
    setting: str
    """Where the path was set, for messages."""
    options: DataOptions
    limit: int = 0
    columns: Mapping[str, str] = field(default_factory=dict)
    decisions: dict[Path, Decision] = field(default_factory=dict)
    bad: list[tuple[Row, str]] = field(default_factory=list)
    num_records: int = 0

    def __iter__(self) -> Iterator[Record]:
        """Yield good records; bad ones are kept in `bad` with the reason.

        Raises:
            DataError: nothing is there, or a whole file is damaged.
        """
        for row in self._rows():
            if self.limit and self.num_records == self.limit:
                return
            try:
                record = self._record(row)
            except ValueError as error:
                self.bad.append((row, str(error)))
            else:
                self.num_records += 1
                yield record

    def files(self) -> list[Path]:
        """List the files of the path; a hub data set has none."""
        return [] if self.path.startswith(HUB) else find_files(self.path, self.setting)

    def complaint(self) -> str:
        """Say how many records cannot be used, and why the first cannot."""
        row, reason = self.bad[0]
        return (
            f"{len(self.bad)} of {len(self.bad) + self.num_records} records in "
            f"{self.setting}={self.path} cannot be used; the first is {row.file} {row.place}: "
            f"{reason}."
        )

    def describe(self) -> str:
        """Say what the records are, and which columns decided it."""
        forms = {d.form.name: d.form for d in self.decisions.values()}
        what = " and ".join(f"{form.title} (columns {form.name})" for form in forms.values())
        return f"{self.setting}={self.path}: {self.num_records:,} records, {what}"

    def check_one_kind(self) -> None:
        """Refuse files that hold records of different kinds.

        Raises:
            DataError: naming the columns and where they were seen.
        """
        seen = {d.form.record: (d, file) for file, d in reversed(self.decisions.items())}
        if len(seen) > 1:
            where = "; ".join(f"{d.form.name} ({file} {d.place})" for d, file in seen.values())
            raise DataError(
                f"{self.setting}={self.path} mixes records of different columns: {where}. Name "
                "the files of one kind."
            )

    def _rows(self) -> Iterator[Row]:
        if self.path.startswith(HUB):
            yield from read_hub(self.path, self.setting, self.limit)
            return
        options = self.options
        how = ReadOptions(
            text_key=options.text_key,
            separator=options.document_separator.replace("\\n", "\n"),
            line_pattern=options.line_pattern,
            csv_quotes=options.csv_quotes,
        )
        for file in find_files(self.path, self.setting):
            yield from read_rows(file, how)

    def _record(self, row: Row) -> Record:
        if row.problem:
            raise ValueError(row.problem)
        value = self._renamed(row.value)
        decision = self.decisions.get(row.file)
        if decision is None:
            form = form_of(value, self.options.text_key)
            if form is None:
                raise ValueError(describe_missing(row.value, self.options.text_key))
            decision = Decision(form, row.place, list(row.value))
        form = decision.form
        if not isinstance(value, Mapping) or not value.keys() >= set(form.columns):
            other = form_of(value, self.options.text_key)
            if other is None:
                raise ValueError(describe_missing(row.value, self.options.text_key))
            lacking = ", ".join(c for c in form.columns if c not in value)
            raise ValueError(
                f"column {lacking} is missing, which {decision.place} has (that is {form.name}, "
                f"this is {other.name})"
            )
        record = form.make(value)
        self.decisions.setdefault(row.file, decision)
        record.place = f"{row.file} {row.place}"
        if isinstance(record, Document) and kind_of(row.file) == ".txt":
            record.name = f"{row.file.name}#{row.place.rpartition(' ')[2]}"
        if isinstance(record, Prompt) and self.options.answer_after and record.answer is not None:
            record.answer = _behind(record.answer, self.options.answer_after)
        if isinstance(record, Dialogue) and self.options.answer_after:
            _behind(record.messages[-1]["content"], self.options.answer_after)
        return record

    def _renamed(self, value: Any) -> Any:
        """Give the columns our names; what was renamed is no longer there under its own."""
        if not self.columns or not isinstance(value, Mapping):
            return value
        gone = [theirs for theirs in self.columns.values() if theirs not in value]
        if gone:
            ours = next(o for o, t in self.columns.items() if t == gone[0])
            raise ValueError(
                f"column {gone[0]} (data.columns.{ours}) is missing; there are {', '.join(value)}"
            )
        rest = {k: v for k, v in value.items() if k not in self.columns.values()}
        return rest | {ours: value[theirs] for ours, theirs in self.columns.items()}


def intakes(options: DataOptions) -> list[tuple[Intake, float]]:
    """Return what `data.path` or `data.mix` names, each with its weight.

    Raises:
        ConfigError: neither is set, or both are, or a weight makes no sense.
    """
    if bool(options.path) == bool(options.mix):
        raise ConfigError(
            "data=file needs data.path=FILE (or a folder, or a pattern), or else data.mix with "
            "several."
        )
    check_mix(options.mix)
    if options.path:
        return [(Intake(options.path, "data.path", options, options.limit, options.columns), 0.0)]
    return [
        (
            Intake(
                part.path,
                f"data.mix[{number}].path",
                options,
                part.limit,
                part.columns or options.columns,
            ),
            part.weight,
        )
        for number, part in enumerate(options.mix)
    ]


def check_mix(mix: Sequence[MixPart]) -> None:
    """Refuse limits and weights of a mixture that make no sense."""
    if any(part.limit < 0 for part in mix):
        raise ConfigError("data.mix has a limit below 0. Leave it out to read everything.")
    weights = [part.weight for part in mix]
    if min(weights, default=0) < 0 or (any(weights) and not all(weights)):
        raise ConfigError(
            f"data.mix has the weights {', '.join(f'{w:g}' for w in weights)}: give every part one "
            "above 0, or none of them any."
        )


def _behind(answer: str, marker: str) -> str:
    behind = answer.rpartition(marker)[2] if marker in answer else ""
    if not behind.strip():
        raise ValueError(f"answer holds nothing behind {marker!r} (data.answer_after)")
    return behind.strip()
