"""`distllm data inspect path=FILE`: what a file is taken for, and what in it cannot be used."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from distllm.cli.arguments import Arguments
from distllm.errors import ConfigError

MAX_SHOWN = 5
"""Reasons that are listed."""


def run(given: Arguments) -> int:
    """Print the decision, the columns, a few records and what is wrong with the bad ones."""
    from distllm.config.compose import compose
    from distllm.data.file import check_one_kind
    from distllm.data.intake import intakes

    config = compose(["data=file", *given.overrides], also_known=("path", "count"))
    options = config.data
    if given.own.get("path"):
        options = replace(options, path=given.own["path"])
    if not options.path and not options.mix:
        raise ConfigError("`distllm data inspect` needs path=FILE (see `distllm data --help`).")
    firsts = [
        _inspect(intake, weight, given.integer("count", 1, least=0))
        for intake, weight in intakes(options)
    ]
    check_one_kind(record for record in firsts if record)
    return 0 if all(firsts) else 2


def _inspect(intake: Any, weight: float, count: int) -> Any:
    """Print what one path holds; return its first record, or None if there is none."""
    from distllm.data.file import SERVED_BY, served_by
    from distllm.data.source import KINDS
    from distllm.types import Prompt

    files = intake.files()
    shown, first = [], None

    def all_records() -> Iterator[Any]:
        nonlocal first
        for record in intake:
            first = first or record
            if len(shown) < count:
                shown.append(record)
            yield record

    records = all_records()
    serves = served_by(records)
    for _ in records:  # whatever is left, for the counts
        pass
    size = f" in {len(files)} files" if len(files) > 1 else ""
    print(f"{intake.path}{size}" + (f", weight {weight:g}" if weight else ""))
    _line("records", f"{intake.num_records:,} usable, {len(intake.bad):,} unusable")
    for where, decision in _distinct(intake.decisions.items()):
        form, columns = decision.form, decision.columns
        kinds = serves if form.record is Prompt else SERVED_BY[form.record]
        _line("decision", f"{form.title}, because of the columns {', '.join(form.columns)}")
        if len(intake.decisions) > 1:
            _line("", f"as in {where} {decision.place}")
        _line("columns", ", ".join(columns) + _renamed(intake.columns))
        _line("serves", "; ".join(f"{kind} ({KINDS[kind]})" for kind in kinds))
    for record in shown:
        _line("record", record.place)
        for name, value in _fields(record):
            _line("", f"{name}: {_brief(value)}")
    reasons: dict[str, list[Any]] = {}
    for row, reason in intake.bad:
        reasons.setdefault(reason, []).append(row)
    for reason, rows in list(reasons.items())[:MAX_SHOWN]:
        more = f" and {len(rows) - 1:,} more" if len(rows) > 1 else ""
        _line("unusable", f"{rows[0].file} {rows[0].place}{more}: {reason}")
    if len(reasons) > MAX_SHOWN:
        _line("", f"and {len(reasons) - MAX_SHOWN:,} other reasons")
    if intake.num_records and intake.bad:
        _line("", "data.on_bad_line=skip leaves them out of training")
    return first


def _distinct(decisions: Any) -> list[tuple[Any, Any]]:
    """Keep the first file of each kind of record."""
    found: dict[str, tuple[Any, Any]] = {}
    for file, decision in decisions:
        found.setdefault(decision.form.name, (file, decision))
    return list(found.values())


def _renamed(columns: dict[str, str]) -> str:
    return "".join(f"; {theirs} is {ours}" for ours, theirs in columns.items())


def _fields(record: Any) -> Sequence[tuple[str, Any]]:
    from dataclasses import fields

    values = [(f, getattr(record, f.name)) for f in fields(record) if f.name != "place"]
    return [(f.name, value) for f, value in values if value != f.default and value != {}]


def _brief(value: Any, limit: int = 160) -> str:
    if isinstance(value, list) and value and isinstance(value[0], dict):
        value = " | ".join(f"{m['role']}: {m['content']}" for m in value)
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def _line(label: str, text: str) -> None:
    print(f"  {label:<9} {text}")
