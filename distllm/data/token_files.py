"""Tokenised shards on disk: their layout, a reader that maps them into memory, and their checksums.

A folder holds `shards.json`, `tokenizer/` and one file a shard: the ids of all documents, each closed by the end token
(uint16 or uint32, little-endian), padding to a multiple of 8 bytes, then the place of each document's first id (int64).
`pipeline/tokenize.py` writes them; rows are cut in `shards.py`.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from distllm.errors import DataError

MANIFEST = "shards.json"
FORMAT = "distllm-shards-1"
ALIGNMENT = 8
"""The places of documents begin at a multiple of this many bytes."""
RELEASE_BYTES = 32 * 2**20
"""Mapped pages are handed back to the kernel after about this much has been read."""
READ_BYTES = 2**20
"""What a read makes resident beside its ids: the search for documents touches pages, and Linux maps 16 for each."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of tokens."""

    file: str
    tokens: int
    """End tokens included."""
    documents: int
    text_bytes: int
    """UTF-8 bytes of the documents' texts."""
    sha256: str


@dataclass(slots=True, kw_only=True)
class Manifest:
    """What `shards.json` says. While the tokenisation is unfinished it is the record of how far it came."""

    vocab_size: int
    eos_id: int
    tokenizer: str
    """Fingerprint."""
    settings: dict[str, Any]
    """What the tokens depend on."""
    shards: dict[str, list[Shard]] = field(default_factory=dict)
    """By split."""
    documents_read: list[int] = field(default_factory=list)
    """Usable records consumed, by path."""
    bad: int = 0
    """Records that could not be read, so far."""
    not_encoded: int = 0
    """Texts that the tokenizer could not be trusted with, so far."""
    seconds: float = 0.0
    """Spent on it, so far."""
    is_complete: bool = False

    @property
    def dtype(self) -> np.dtype:
        """The narrowest type that holds every id."""
        return np.dtype("<u2" if self.vocab_size <= 2**16 else "<u4")

    def total(self, name: str, split: str = "") -> int:
        """Add up a number of the shards of one split, or of all."""
        splits = [split] if split else list(self.shards)
        return sum(getattr(shard, name) for s in splits for shard in self.shards.get(s, ()))

    def to_json(self) -> dict[str, Any]:
        """Return it ready to be written."""
        return {"format": FORMAT, "dtype": self.dtype.name, **asdict(self)}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read `shards.json`.

        Raises:
            DataError: it is missing, or none of ours.
        """
        path = folder / MANIFEST
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value.pop("format") != FORMAT:
                raise ValueError(f"its format is not {FORMAT}")
            value.pop("dtype")
            shards = value.pop("shards")
            return cls(**value, shards={s: [Shard(**x) for x in xs] for s, xs in shards.items()})
        except FileNotFoundError:
            raise DataError(
                f"{folder} holds no {MANIFEST}. Make it with: distllm data tokenize path=FILES tokenizer=DIR "
                f"out={folder}"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error}.") from error


def places_at(num_tokens: int, dtype: np.dtype) -> int:
    """Return the byte at which the places of documents begin."""
    return -(-num_tokens * dtype.itemsize // ALIGNMENT) * ALIGNMENT


def check_shard(folder: Path, shard: Shard, dtype: np.dtype, *, content: bool) -> None:
    """Compare a shard's file with the manifest: its size, and its checksum if `content`.

    Raises:
        DataError: naming the file and both values.
    """
    path = folder / shard.file
    size = places_at(shard.tokens, dtype) + 8 * shard.documents
    found = path.stat().st_size if path.exists() else None
    if found != size:
        what = "is missing" if found is None else f"has {found} bytes"
        raise DataError(
            f"{path} {what}; {MANIFEST} says {size} bytes. Copy it anew, or tokenise again."
        )
    if content:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != shard.sha256:
            raise DataError(
                f"{path} is damaged: its SHA-256 is {sha256[:16]}..., {MANIFEST} says {shard.sha256[:16]}... "
                "Copy it anew, or tokenise again."
            )


class TokenFiles:
    """All shards of one split as one long sequence of ids; nothing is read until it is asked for.

    Pages that were read count as ours until the kernel needs them; they are handed back now and then, so that the
    resident memory stays flat however large the corpus is.
    """

    def __init__(self, folder: Path, split: str, limit: int = 0) -> None:
        """Map the shards.

        Args:
            folder: holds `shards.json`.
            split: `train` or `heldout`.
            limit: only the first so many documents; 0 for all.

        Raises:
            DataError: the tokenisation is unfinished, or a file has another size than it should.
        """
        self.manifest = Manifest.read(folder)
        if not self.manifest.is_complete:
            raise DataError(
                f"{folder} is unfinished. Run the same `distllm data tokenize` again: it goes on where it stopped."
            )
        dtype = self.manifest.dtype
        self._maps: list[mmap.mmap] = []
        self._tokens: list[np.ndarray] = []
        self._places: list[np.ndarray] = []
        shards = self.manifest.shards.get(split, [])
        for shard in shards:
            check_shard(folder, shard, dtype, content=False)
            with (folder / shard.file).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            _advise(mapped, "MADV_RANDOM")
            self._maps.append(mapped)
            offset = places_at(shard.tokens, dtype)
            self._tokens.append(np.frombuffer(mapped, dtype, shard.tokens))
            # int64 as what is searched for: another type would make numpy copy the whole array at each search.
            self._places.append(np.frombuffer(mapped, "<i8", shard.documents, offset))
        self._ends = np.cumsum([s.tokens for s in shards], dtype=np.int64)
        self._document_ends = np.cumsum([s.documents for s in shards], dtype=np.int64)
        self.num_documents = int(self._document_ends[-1]) if shards else 0
        self.num_tokens = int(self._ends[-1]) if shards else 0
        self.text_bytes = sum(s.text_bytes for s in shards)
        if 0 < limit < self.num_documents:
            self.num_tokens = self._first(limit)
            self.text_bytes = self.text_bytes * limit // self.num_documents  # close, not exact
            self.num_documents = limit
        self._touched = 0

    def read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids at places first .. last - 1 and the number of the document that each belongs to."""
        ids, owners = [], []
        shard = int(np.searchsorted(self._ends, first, "right"))
        while first < last:
            base = int(self._ends[shard - 1]) if shard else 0
            stop = min(last, int(self._ends[shard]))
            places = np.arange(first - base, stop - base)
            found = np.searchsorted(self._places[shard], places, "right") - 1
            ids.append(self._tokens[shard][first - base : stop - base].astype(np.int64))
            owners.append(found + (int(self._document_ends[shard - 1]) if shard else 0))
            first, shard = stop, shard + 1
        self._touched += 8 * sum(map(len, ids)) + READ_BYTES
        if self._touched > RELEASE_BYTES:
            self.release()
        return np.concatenate(ids), np.concatenate(owners)

    def document(self, number: int) -> np.ndarray:
        """Return the ids of a document, its end token included."""
        if not 0 <= number < self.num_documents:
            raise IndexError(f"document {number} of {self.num_documents}")
        last = self.num_documents - 1
        stop = self.num_tokens if number == last else self._first(number + 1)
        return self.read(self._first(number), stop)[0]

    def release(self) -> None:
        """Hand the pages that were read back to the kernel; the next read maps them again."""
        for mapped in self._maps:
            _advise(mapped, "MADV_DONTNEED")
        self._touched = 0

    def _first(self, document: int) -> int:
        """Return the place of a document's first id."""
        shard = int(np.searchsorted(self._document_ends, document, "right"))
        base = int(self._ends[shard - 1]) if shard else 0
        inside = document - (int(self._document_ends[shard - 1]) if shard else 0)
        return base + int(self._places[shard][inside])


def _advise(mapped: mmap.mmap, name: str) -> None:
    """Tell the kernel how the mapping is used, where the system has a word for it."""
    advice = getattr(mmap, name, None)
    if advice is not None:
        mapped.madvise(advice)
