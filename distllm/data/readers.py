"""Files to rows: strict reading of .txt, .jsonl, .json and .parquet (`rows.py` checks the rows).

Damage that concerns a whole file (missing, empty, binary, cut short) is a DataError at once; a line
that cannot be read becomes a row with a problem, for the caller to refuse or to skip.
"""

from __future__ import annotations

import glob
import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distllm.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")
"""Endings this reads; all but .parquet also with .gz."""


@dataclass(slots=True)
class Row:
    """One row of a file: a value, or the reason why there is none."""

    file: Path
    place: str
    """`line 7`, `item 7` (of a JSON list) or `row 7`, counted from 1."""
    value: Any = None
    problem: str = ""


def find_files(path: str, setting: str) -> list[Path]:
    """List what `path` names, sorted: a file, a folder's files, or the matches of a pattern.

    Raises:
        DataError: nothing is there; `setting` says where the path was set.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(
            f for f in place.rglob("*") if f.is_file() and kind_of(f) and not _hidden(f, place)
        )
        if not files:
            raise DataError(f"{setting}={path} is a folder without any {_known()} file.")
    elif place.exists():
        files = [place]
    else:
        files = sorted(Path(f) for f in glob.glob(str(place), recursive=True) if Path(f).is_file())
        if not files:
            raise DataError(f"{setting}={path} does not exist (seen from {Path.cwd()}).")
    for file in files:
        if not kind_of(file):
            raise DataError(
                f"{setting}: {file} does not end in {_known()}, so its format is unknown."
            )
    return files


def kind_of(file: Path) -> str:
    """Return the ending that decides the format, or an empty string."""
    suffixes = [s.lower() for s in file.suffixes]
    packed = suffixes[-1:] == [".gz"]
    ending = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    return ending if ending in SUFFIXES and not (packed and ending == ".parquet") else ""


def read_text(file: Path) -> str:
    """Read a text file; line ends become `\\n` and a byte-order mark is dropped."""
    data = _read_bytes(file)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{file} is not UTF-8 text: line {line}, byte {error.start} of the file. Convert it "
            "with iconv."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_rows(file: Path) -> Iterator[Row]:
    """Yield the rows of a .jsonl, .json or .parquet file."""
    readers = {".jsonl": _json_lines, ".json": _json_list, ".parquet": _parquet}
    return readers[kind_of(file)](file)


def _json_lines(file: Path) -> Iterator[Row]:
    data = _read_bytes(file).removeprefix(b"\xef\xbb\xbf")
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = Row(file, f"line {number}")
        try:
            row.value = _parse(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            row.problem = f"not UTF-8 (byte {error.start} of the line)"
        except (ValueError, RecursionError) as error:
            row.problem = f"not JSON ({error})"
            if number == len(lines):
                row.problem += "; the file ends in the middle of this line, as if half-written"
        yield row


def _json_list(file: Path) -> Iterator[Row]:
    text = read_text(file)
    try:
        value = _parse(text)
    except (ValueError, RecursionError) as error:
        hint = ""
        if "Extra data" in str(error):
            hint = " If it holds one object a line, name it .jsonl."
        raise DataError(f"{file} is not JSON: {error}.{hint}") from error
    if not isinstance(value, list):
        raise DataError(
            f"{file} holds {_type_name(value)}; a .json file must hold a list of objects."
        )
    for number, item in enumerate(value, start=1):
        yield Row(file, f"item {number}", item)


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not file.stat().st_size:
        raise DataError(f"{file} is empty.")
    number = 0
    try:
        with pq.ParquetFile(file, page_checksum_verification=True) as table:
            for batch in table.iter_batches():
                for item in batch.to_pylist():
                    number += 1
                    yield Row(file, f"row {number}", item)
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{file} cannot be read as parquet: {error} (after {number} rows)."
        ) from error


def _read_bytes(file: Path) -> bytes:
    """Read a file, unpacked if it is .gz, refusing what cannot be text."""
    try:
        if file.suffix.lower() == ".gz":
            with gzip.open(file) as stream:
                data = stream.read()
        else:
            data = file.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is not a whole gzip file: {error}.") from error
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    if not data.strip():
        raise DataError(f"{file} is empty.")
    nul = data.find(b"\0")
    if nul >= 0:
        line = data.count(b"\n", 0, nul) + 1
        raise DataError(
            f"{file} holds a zero byte (line {line}, byte {nul}): it is binary, UTF-16, or was "
            "damaged while being written. Text must be UTF-8."
        )
    return data


def _parse(text: str) -> Any:
    """Parse JSON as the standard has it: no NaN, no key twice."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found


def _type_name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _hidden(file: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(folder).parts)


def _known() -> str:
    return ", ".join(SUFFIXES)
