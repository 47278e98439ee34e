"""Files to rows, read in a stream: text, JSON lines and JSON here, tables in `tables.py`.

Damage that concerns a whole file (missing, empty, binary, cut short) is a DataError; a line that
cannot be read becomes a row with a problem, for the caller to refuse or to skip. `rows.py` checks
what the rows hold.
"""

from __future__ import annotations

import glob
import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from distllm.errors import ConfigError, DataError

TABLES = (".csv", ".tsv", ".parquet", ".arrow")
SUFFIXES = (".txt", ".jsonl", ".ndjson", ".json", *TABLES, ".conll")
"""Endings this reads."""
PACKINGS = (".gz", ".zst")
"""What may follow them; .parquet and .arrow have a compression of their own."""

_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 16
_BESIDE_ARROW = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What the datasets library writes next to its .arrow files."""


@dataclass(slots=True)
class Row:
    """One row of a file: a value, or the reason why there is none."""

    file: Path
    place: str
    """`line 7`, `item 7` (of a JSON list) or `row 7`, counted from 1."""
    value: Any = None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadOptions:
    """How files are read, as far as their endings do not tell."""

    text_key: str = "text"
    separator: str = "\n\n"
    """.txt: what stands between two documents; empty makes a file one document."""
    line_pattern: str = ""
    """.txt: regular expression whose named groups are the columns of each line."""
    csv_quotes: bool = True
    """.csv, .tsv: whether a quotation mark opens a quoted field."""


def find_files(path: str, setting: str) -> list[Path]:
    """List what `path` names, sorted: a file, a folder's files, or the matches of a pattern.

    Raises:
        DataError: nothing is there; `setting` says where the path was set.
    """
    place = Path(path).expanduser()
    if place.is_dir():
        files = sorted(f for f in place.rglob("*") if _is_data(f, place))
        if not files:
            raise DataError(f"{setting}={path} is a folder without any {', '.join(SUFFIXES)} file.")
    elif place.exists():
        files = [place]
    else:
        files = sorted(Path(f) for f in glob.glob(str(place), recursive=True) if Path(f).is_file())
        if not files:
            hint = ""
            if re.fullmatch(r"[\w.-]+/[\w.-]+", path):
                hint = f" For a data set of the Hugging Face hub write hub:{path}."
            raise DataError(f"{setting}={path} does not exist (seen from {Path.cwd()}).{hint}")
    for file in files:
        if not kind_of(file):
            raise DataError(
                f"{setting}: {file} does not end in {', '.join(SUFFIXES)} (or one of these with "
                f"{' or '.join(PACKINGS)}), so its format is unknown."
            )
    return files


def kind_of(file: Path) -> str:
    """Return the ending that decides the format, or an empty string."""
    suffixes = [s.lower() for s in file.suffixes]
    packed = bool(suffixes) and suffixes[-1] in PACKINGS
    ending = "".join(suffixes[-2:-1] if packed else suffixes[-1:])
    return ending if ending in SUFFIXES and not (packed and ending in TABLES[2:]) else ""


def read_rows(file: Path, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a file, of which never more than a piece is in memory (JSON lists aside).

    Raises:
        DataError: the file as a whole is damaged.
    """
    from distllm.data import tables

    match kind_of(file):
        case ".txt" if options.line_pattern:
            return _matched_lines(file, options.line_pattern)
        case ".txt":
            return _documents(file, options)
        case ".json":
            return _json_list(file)
        case ".csv":
            return tables.read_csv(file, ",", options.csv_quotes)
        case ".tsv":
            return tables.read_csv(file, "\t", options.csv_quotes)
        case ".parquet":
            return tables.read_parquet(file)
        case ".arrow":
            return tables.read_arrow(file)
        case ".conll":
            return _sentences(file)
    return _json_lines(file)


def read_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (number from 1, line with its end) of a possibly packed file.

    Raises:
        DataError: the file cannot be read or unpacked, holds nothing, or holds a zero byte.
    """
    offset, is_blank = 0, True
    try:
        with _open(file) as stream:
            for number, line in enumerate(stream, start=1):
                if b"\0" in line:
                    raise DataError(
                        f"{file} holds a zero byte (line {number}, byte "
                        f"{offset + line.index(0)}): it is binary, UTF-16, or was damaged while "
                        "being written. Text must be UTF-8."
                    )
                offset += len(line)
                line = line.removeprefix(_BOM) if number == 1 else line
                is_blank = is_blank and not line.strip()
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{file} is not a whole gzip file: {error}.") from error
    except OSError as error:
        if file.suffix.lower() == ".zst" and error.errno is None:
            raise DataError(f"{file} is not a whole zstd file: {error}.") from error
        raise DataError(f"{file} cannot be read: {error.strerror or error}.") from error
    if is_blank:
        raise DataError(f"{file} is empty.")


def read_text_lines(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, text of the line); every kind of line end becomes `\\n`.

    Raises:
        DataError: as `read_lines`, or the text is not UTF-8.
    """
    offset = 0
    for number, line in read_lines(file):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{file} is not UTF-8 text: line {number}, byte {offset + error.start} of the "
                "file. Convert it with iconv."
            ) from error
        offset += len(line)
        yield number, text.replace("\r\n", "\n").replace("\r", "\n")


def parse_json(text: str) -> Any:
    """Parse JSON as the standard has it: no NaN, no key twice."""
    return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique_keys)


def _open(file: Path) -> IO[bytes]:
    ending = file.suffix.lower()
    if ending == ".gz":
        return cast("IO[bytes]", gzip.open(file))
    if ending == ".zst":
        import io

        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    return file.open("rb")


def _json_lines(file: Path) -> Iterator[Row]:
    for number, line in read_lines(file):
        if not line.strip():
            continue
        row = Row(file, f"line {number}")
        try:
            row.value = parse_json(line.rstrip(b"\r\n").decode("utf-8"))
        except UnicodeDecodeError as error:
            row.problem = f"not UTF-8 (byte {error.start} of the line)"
        except (ValueError, RecursionError) as error:
            row.problem = f"not JSON ({error})"
            if not line.endswith(b"\n"):
                row.problem += "; the file ends in the middle of this line, as if half-written"
        yield row


def _json_list(file: Path) -> Iterator[Row]:
    text = "".join(line for _, line in read_text_lines(file))
    try:
        value = parse_json(text)
    except (ValueError, RecursionError) as error:
        hint = ""
        if "Extra data" in str(error):
            hint = " If it holds one object a line, name it .jsonl."
        raise DataError(f"{file} is not JSON: {error}.{hint}") from error
    if not isinstance(value, list):
        raise DataError(
            f"{file} holds {type(value).__name__}; a .json file must hold a list of objects."
        )
    for number, item in enumerate(value, start=1):
        yield Row(file, f"item {number}", item)


def _documents(file: Path, options: ReadOptions) -> Iterator[Row]:
    """Cut a text file at the separator."""
    number = 0
    for part in _split(file, options.separator):
        if part.strip():
            number += 1
            yield Row(file, f"part {number}", {options.text_key: part.strip("\n")})


def _split(file: Path, separator: str) -> Iterator[str]:
    """Split the text of a file as `str.split` would, reading piece by piece."""
    rest, piece, size = "", [], 0
    for _, line in read_text_lines(file):
        piece.append(line)
        size += len(line)
        if separator and size >= _PIECE:
            *whole, rest = (rest + "".join(piece)).split(separator)
            yield from whole
            piece, size = [], 0
    rest += "".join(piece)
    yield from rest.split(separator) if separator else [rest]


def _matched_lines(file: Path, pattern: str) -> Iterator[Row]:
    """Make columns of the named groups of `pattern`."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"data.line_pattern={pattern} is not a regular expression: {error}."
        ) from error
    if not compiled.groupindex:
        raise ConfigError(
            f"data.line_pattern={pattern} names no column. Write groups such as "
            "(?P<label>\\S+) (?P<text>.+)."
        )
    for number, line in read_text_lines(file):
        if line.strip():
            found = compiled.fullmatch(line.removesuffix("\n"))
            row = Row(file, f"line {number}", found.groupdict() if found else None)
            if not found:
                row.problem = f"{line[:60]!r} does not match data.line_pattern={pattern}"
            yield row


def _sentences(file: Path) -> Iterator[Row]:
    """Make rows of sentences: a word a line, its first column and its last; blank lines between."""
    words: list[list[str]] = []
    start = problem = ""

    def finish() -> Iterator[Row]:
        if words:
            value = {"tokens": [w[0] for w in words], "tags": [w[-1] for w in words]}
            yield Row(file, start, value, problem)

    for number, line in read_text_lines(file):
        columns = line.split()
        if (not words and line.startswith("# ")) or columns[:1] == ["-DOCSTART-"]:
            continue
        if columns:
            start = start or f"line {number}"
            words.append(columns)
            if len(columns) < 2:
                problem = f"line {number} holds a word and no tag"
        else:
            yield from finish()
            words, start, problem = [], "", ""
    yield from finish()


def _is_data(file: Path, folder: Path) -> bool:
    """Say whether a file of a folder is one of its data files."""
    if any(part.startswith(".") for part in file.relative_to(folder).parts):
        return False
    if file.name in _BESIDE_ARROW and any(file.parent.rglob("*.arrow")):
        return False
    return bool(kind_of(file)) and file.is_file()


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands there twice")
    return found
