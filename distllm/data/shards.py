"""Tokenised shards as a source: made once with `distllm data tokenize`, mapped into memory, mixed without being rewritten."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from distllm.data.intake import check_mix
from distllm.data.mixture import Joined
from distllm.data.options import DataOptions, MixPart
from distllm.data.packing import PackedDataset
from distllm.data.source import Source, check_split
from distllm.data.token_files import Manifest, TokenFiles, check_shard
from distllm.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from distllm.errors import ConfigError, DataError
from distllm.registry import register
from distllm.types import Document

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ShardedRows(PackedDataset):
    """The rows that `PackedDataset` would make of the same documents, read from shards when they are asked for."""

    def __init__(self, files: TokenFiles, seq_len: int, *, eos_id: int, pad_id: int) -> None:
        if seq_len < 1:
            raise DataError(f"train.seq_len={seq_len} must be at least 1.")
        self.files = files
        self.seq_len, self.eos_id, self.pad_id = seq_len, eos_id, pad_id
        self.num_bytes = files.text_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens in all documents, end tokens included."""
        return self.files.num_tokens

    @property
    def num_documents(self) -> int:
        """Documents, empty ones not counted."""
        return self.files.num_documents

    def documents(self) -> Sequence[np.ndarray]:
        """Return each document's ids, its end token included; each is read when it is looked at."""
        return _Lazy(self.files)

    def _read(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        return self.files.read(first, last)


@register("data")
class ShardsSource(Source):
    """Documents of `data.path` or `data.mix`: folders written by `distllm data tokenize`."""

    serves = ("documents",)

    def __init__(self, options: DataOptions, seed: int) -> None:
        super().__init__(options, seed)
        if bool(options.path) == bool(options.mix):
            raise ConfigError(
                "data=shards needs data.path=DIR (made by `distllm data tokenize`), or else data.mix with several."
            )
        check_mix(options.mix)
        self._parts = list(options.mix) or [MixPart(path=str(options.path), limit=options.limit)]
        self._manifests = [Manifest.read(Path(part.path).expanduser()) for part in self._parts]
        first = self._manifests[0]
        for part, manifest in zip(self._parts, self._manifests, strict=True):
            if manifest.tokenizer != first.tokenizer:
                raise ConfigError(
                    f"data.mix: {part.path} was tokenised with another tokenizer ({manifest.tokenizer[:16]}) than "
                    f"{self._parts[0].path} ({first.tokenizer[:16]}). Tokenise both with one."
                )

    @property
    def tokenizer_dir(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The tokenizer that the shards were made with."""
        return str(Path(self._parts[0].path).expanduser() / "tokenizer")

    def verify(self, part: int, parts: int) -> None:
        """Compare every `parts`-th shard with its checksum, beginning with number `part`.

        Raises:
            DataError: naming the damaged file.
        """
        if not self.options.verify:
            return
        shards = [
            (Path(p.path).expanduser(), shard, manifest.dtype)
            for p, manifest in zip(self._parts, self._manifests, strict=True)
            for split in manifest.shards.values()
            for shard in split
        ]
        for folder, shard, dtype in shards[part::parts]:
            check_shard(folder, shard, dtype, content=True)

    def encoded(self, tok: PreTrainedTokenizerFast, split: str) -> list[tuple[list[Any], float]]:
        """Return the ids of all documents without end tokens, in memory, by part with its weight."""
        rows = self.rows(tok, 1, split)
        parts = rows.parts if isinstance(rows, Joined) else [rows]
        weights = [share.weight for share in getattr(rows, "shares", ())] or [0.0] * len(parts)
        return [
            ([ids[:-1] for ids in part.documents()], weight)
            for part, weight in zip(parts, weights, strict=True)
        ]

    def rows(self, tok: PreTrainedTokenizerFast, seq_len: int, split: str) -> ShardedRows | Joined:
        """Return the packed rows of `split`.

        Raises:
            ConfigError: the shards were made with another tokenizer.
            DataError: there is no document.
        """
        check_split(split)
        manifest = self._manifests[0]
        if tokenizer_fingerprint(tok) != manifest.tokenizer:
            raise ConfigError(
                f"The shards in {self._parts[0].path} were made with another tokenizer than the run's. Set "
                f"tokenizer={self.tokenizer_dir}, or tokenise the texts again."
            )
        eos_id = manifest.eos_id
        pad_id = eos_id if tok.pad_token_id is None else int(tok.pad_token_id)  # type: ignore[arg-type]
        parts = []
        for part in self._parts:
            files = TokenFiles(Path(part.path).expanduser(), split, part.limit)
            if files.num_documents or not self.options.mix:
                rows = ShardedRows(files, seq_len, eos_id=eos_id, pad_id=pad_id)
                parts.append((rows, part.weight))
        if not any(len(rows) for rows, _ in parts):
            raise DataError(
                f"{self._parts[0].path} holds no document in split {split}. Tokenise more texts, or with another "
                "data.heldout_fraction or a data.heldout_path."
            )
        return parts[0][0] if len(parts) == 1 else Joined(parts)

    def documents(self, split: str) -> list[Document]:
        """Return the texts, decoded; meant for looking at, not for training."""
        check_split(split)
        tok = self._tokenizer
        texts = []
        for part in self._parts:
            files = TokenFiles(Path(part.path).expanduser(), split, part.limit)
            for number in range(files.num_documents):
                text = tok.decode(files.document(number)[:-1].tolist())
                texts.append(Document(text=text, name=f"{part.path}#{number}"))  # type: ignore[arg-type]
        return texts

    def fingerprint(self) -> str:
        """Hash the checksums of all shards (sha256, hex)."""
        parts = [
            [part.weight, part.limit, manifest.to_json()["shards"]]
            for part, manifest in zip(self._parts, self._manifests, strict=True)
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.tokenizer_dir)


class _Lazy(Sequence[np.ndarray]):
    """The documents of shards, read one by one."""

    def __init__(self, files: TokenFiles) -> None:
        self._files = files

    def __len__(self) -> int:
        return self._files.num_documents

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self._files.document(i) for i in range(*index.indices(len(self)))]
        return self._files.document(index)

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self._files.document(i) for i in range(len(self)))
