"""Tables to rows: CSV and TSV, parquet, Arrow, and data sets of the Hugging Face hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from distllm.data.readers import Row, read_text_lines
from distllm.errors import ConfigError, DataError

HUB = "hub:"
"""Begins a path that names a data set of the Hugging Face hub, or what `datasets` can load."""

_HUB_KEYS = ("config", "split", "revision", "streaming")
_LONGEST_CELL = 2**31 - 1


def read_csv(file: Path, delimiter: str, quotes: bool) -> Iterator[Row]:
    """Yield the rows of a table with a header; every value is a text.

    Raises:
        DataError: there is no usable header.
    """
    csv.field_size_limit(_LONGEST_CELL)
    lines = (line for _, line in read_text_lines(file))
    quoting = csv.QUOTE_MINIMAL if quotes else csv.QUOTE_NONE
    reader = csv.reader(lines, delimiter=delimiter, quoting=quoting, strict=True)
    header = [name.strip() for name in next(reader, [])]
    if not all(header) or len(set(header)) < len(header):
        raise DataError(
            f"{file} must begin with a line of column names, each different; it begins with "
            f"{delimiter.join(header)[:100]!r}."
        )
    other = next((d for d in ",;\t|" if d != delimiter and d in "".join(header)), "")
    if len(header) == 1 and other:
        raise DataError(
            f"{file} has one column, {header[0][:100]!r}, as if {other!r} stood between columns. A .csv file needs "
            "commas, a .tsv file tabs."
        )
    while True:
        row = Row(file, f"line {reader.line_num + 1}")
        try:
            cells = next(reader, None)
        except csv.Error as error:
            hint = " Set data.csv_quotes=false if quotation marks are text." if quotes else ""
            row.problem = f"not a row of a table ({error}).{hint}".rstrip(".")
            yield row
            continue
        if cells is None:
            return
        if not cells:
            continue
        if len(cells) != len(header):
            row.problem = f"{len(cells)} values for {len(header)} columns ({', '.join(header)})"
        row.value = dict(zip(header, cells, strict=False))
        yield row


def read_parquet(file: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file.

    Raises:
        DataError: it is empty or damaged.
    """
    import pyarrow.parquet as pq

    def batches() -> Iterator[Any]:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            yield from table.iter_batches()

    return _arrow_rows(file, "parquet", batches())


def read_arrow(file: Path) -> Iterator[Row]:
    """Yield the rows of an Arrow file in either form: stream (as `datasets` writes) or file.

    Raises:
        DataError: it is empty or damaged.
    """
    import pyarrow as pa

    def batches() -> Iterator[Any]:
        with pa.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                reader = pa.ipc.open_file(source)
                for number in range(reader.num_record_batches):
                    yield reader.get_batch(number)
            else:
                source.seek(0)
                yield from pa.ipc.open_stream(source)

    return _arrow_rows(file, "Arrow", batches())


def read_hub(path: str, setting: str, limit: int = 0) -> Iterator[Row]:
    """Yield the rows of `hub:NAME?config=C&split=S&revision=R&streaming=true` (all but NAME optional).

    `split` is `train` unless given. Rows are streamed when asked, and when `limit` (0 for all) is
    set: then no more is downloaded than is needed.

    Raises:
        ConfigError: the path is malformed.
        DataError: the data set cannot be loaded.
    """
    import datasets

    name, _, query = path.removeprefix(HUB).partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [key for key in given if key not in _HUB_KEYS]
    if not name or unknown:
        raise ConfigError(
            f"{setting}={path} is not understood{f' ({unknown[0]})' if unknown else ''}. Write "
            f"{HUB}ORG/NAME, or {HUB}ORG/NAME?config=C&split=S&revision=R&streaming=true."
        )
    streaming = given.get("streaming", "").lower() == "true" or limit > 0
    split = given.get("split", "train")
    try:
        loaded = datasets.load_dataset(
            name,
            given.get("config"),
            split=split,
            revision=given.get("revision"),
            streaming=streaming,
        )
        names = _label_names(loaded.features or {})
        for number, value in enumerate(islice(loaded, limit or None), start=1):
            yield Row(Path(f"{HUB}{name}"), f"{split} row {number}", _named(value, names))
    except ConfigError:
        raise
    except Exception as error:  # the library raises dozens of types, of four packages
        raise DataError(
            f"{setting}={path} cannot be loaded: {type(error).__name__}: {error}"
        ) from error


def _arrow_rows(file: Path, what: str, batches: Iterable[Any]) -> Iterator[Row]:
    import pyarrow as pa

    if not file.stat().st_size:
        raise DataError(f"{file} is empty.")
    number, names = 0, None
    try:
        for batch in batches:
            if names is None:
                names = _label_names(_hub_features(batch.schema))
            for value in batch.to_pylist():
                number += 1
                yield Row(file, f"row {number}", _named(value, names))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as {what}: {error} (after {number} rows)."
        ) from error


def _hub_features(schema: Any) -> dict[str, Any]:
    """Return what the datasets library wrote about the columns."""
    try:
        return json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, KeyError, ValueError):
        return {}


def _label_names(features: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return column -> names of its classes, where its numbers stand for classes."""
    found = {}
    for column, feature in features.items():
        inner = feature.get("feature") if isinstance(feature, dict) else _inner(feature)
        for kind in (feature, inner):
            names = kind.get("names") if isinstance(kind, dict) else getattr(kind, "names", None)
            if names:
                found[column] = list(names)
    return found


def _inner(feature: Any) -> Any:
    return (
        feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    )


def _named(row: dict[str, Any], names: Mapping[str, list[str]]) -> dict[str, Any]:
    """Put the names of classes in place of their numbers; -1 (no label) becomes None."""

    def name(value: Any, known: list[str]) -> Any:
        if isinstance(value, list):
            return [name(v, known) for v in value]
        if not isinstance(value, int) or isinstance(value, bool) or value >= len(known):
            return value
        return known[value] if value >= 0 else None

    if not names:
        return row
    return row | {c: name(row[c], known) for c, known in names.items() if c in row}
