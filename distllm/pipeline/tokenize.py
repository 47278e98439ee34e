"""A corpus to tokenised shards (`data/token_files.py` has their layout): in parallel, and resumable.

Documents are read in order, encoded by several processes, and written in order, so that the bytes do not depend on how
many processes there are, nor on where the job was stopped. After each shard `shards.json` says how far it came.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from distllm.data.encode_job import TextBatch, TokenBatch, encode_in_order
from distllm.data.file import SERVED_BY
from distllm.data.intake import Intake, intakes
from distllm.data.options import DataOptions, OnBadLine
from distllm.data.source import check_fraction, hash_share
from distllm.data.token_files import MANIFEST, Manifest, Shard, check_shard, places_at
from distllm.data.tokenizer import load_tokenizer, save_tokenizer, tokenizer_fingerprint
from distllm.errors import ConfigError, DataError
from distllm.train.files import atomic_write_json, fault_point, make_dirs, sync_dir
from distllm.train.signals import StopFlag, die_with_parent
from distllm.types import Document

_log = logging.getLogger("distllm")

BATCH_CHARACTERS = 2**19
"""Characters that are handed to a process at a time."""
BAD_SHOWN = 5
"""Bad records whose reasons are shown."""
REPORT_EVERY_S = 5.0


def tokenize(
    options: DataOptions,
    tokenizer_dir: str,
    out: Path,
    *,
    num_workers: int,
    shard_tokens: int,
    stop: StopFlag,
    say: Callable[[str], None],
) -> Manifest:
    """Write the documents of `options.path` as shards, or go on where an earlier call stopped.

    Args:
        options: as of data=file.
        tokenizer_dir: in Hugging Face layout; a copy of it is kept beside the shards.
        out: folder to write.
        num_workers: processes that encode.
        shard_tokens: a shard of training text is closed once it has at least so many tokens.
        stop: ends the job early; the manifest is then not complete.
        say: shows a line of progress.

    Raises:
        ConfigError: a setting is wrong, or differs from what `out` was begun with.
        DataError: a record cannot be used, and `data.on_bad_line` is `error`.
    """
    if options.mix:
        raise ConfigError(
            "A mixture is not tokenised as one. Tokenise each path into a folder of its own, then train with "
            "data=shards and data.mix=[{path:A,weight:0.7},{path:B,weight:0.3}]."
        )
    for name, value in (("workers", num_workers), ("shard_tokens", shard_tokens)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1.")
    check_fraction(options.heldout_fraction)
    tok = load_tokenizer(tokenizer_dir)
    if tok.eos_token_id is None:
        raise ConfigError(
            f"tokenizer={tokenizer_dir} has no eos_token, which must end each document. Take one that has."
        )
    sources = [(intakes(options)[0][0], False)]
    if options.heldout_path:
        held = Intake(options.heldout_path, "data.heldout_path", options, columns=options.columns)
        sources.append((held, True))
    fresh = Manifest(
        vocab_size=len(tok),
        eos_id=int(tok.eos_token_id),  # type: ignore[arg-type]
        tokenizer=tokenizer_fingerprint(tok),
        settings=_settings(options, sources, shard_tokens),
        shards={"train": [], "heldout": []},
        documents_read=[0] * len(sources),
    )
    make_dirs(out)
    with _held(out):
        manifest = _begun(out, fresh)
        if manifest.is_complete:
            return manifest
        if not (out / "tokenizer").exists():
            save_tokenizer(tok, out / "tokenizer")
        _Job(options, sources, out, manifest, shard_tokens, stop, say).run(num_workers)
    return manifest


class _Job:
    """One run of the job."""

    def __init__(
        self,
        options: DataOptions,
        sources: list[tuple[Intake, bool]],
        out: Path,
        manifest: Manifest,
        shard_tokens: int,
        stop: StopFlag,
        say: Callable[[str], None],
    ) -> None:
        self.options, self.sources, self.out, self.manifest = options, sources, out, manifest
        self.shard_tokens, self.stop, self.say = shard_tokens, stop, say
        self.started = time.monotonic()
        self.seconds_before, self.tokens_before = manifest.seconds, manifest.total("tokens")
        self.bad = 0
        """Counted anew: what was read before is read again, only not encoded."""
        self.not_encoded = manifest.not_encoded
        self.bad_shown = 0
        self.writers: dict[str, _Writer] = {}

    def run(self, num_workers: int) -> None:
        """Encode what is left; leaves the manifest complete unless it was stopped."""
        try:
            self._run(num_workers)
        finally:
            for writer in self.writers.values():
                writer.discard()

    def _run(self, num_workers: int) -> None:
        manifest, told = self.manifest, time.monotonic()
        self._open_writers()
        read, bad = manifest.documents_read, manifest.bad
        results = encode_in_order(
            self._batches(),
            str(self.out / "tokenizer"),
            manifest.eos_id,
            manifest.dtype,
            num_workers,
            _start_child,
        )
        with contextlib.closing(results):
            for batch, encoded in results:
                self._write(batch, encoded)
                read, bad = batch.progress
                if self.writers["train"].tokens >= self.shard_tokens:
                    self._close_shards(read, bad)
                    self._open_writers()
                if time.monotonic() - told > REPORT_EVERY_S:
                    told = time.monotonic()
                    self.say(self.report())
                if self.stop.requested:
                    return
        self.manifest.is_complete = True
        self._close_shards(read, self.bad)

    def report(self) -> str:
        """Word how far it came and how fast."""
        manifest = self.manifest
        new = {s: w for s, w in self.writers.items() if not w.closed}
        tokens = manifest.total("tokens") + sum(w.tokens for w in new.values())
        documents = manifest.total("documents") + sum(len(w.places) for w in new.values())
        rate = (tokens - self.tokens_before) / max(1e-9, time.monotonic() - self.started)
        return (
            f"{tokens:,} tokens, {documents:,} documents, {self.bad + self.not_encoded:,} bad records, "
            f"{rate:,.0f} tokens/s"
        )

    def _batches(self) -> Iterator[TextBatch]:
        """Read documents, those that were written already left out."""
        read = [0] * len(self.sources)
        for number, (intake, is_heldout) in enumerate(self.sources):
            skip = self.manifest.documents_read[number]
            batch, size = TextBatch(), 0
            for record in intake:
                if not isinstance(record, Document):
                    raise ConfigError(
                        f"{intake.setting}={intake.path} holds {SERVED_BY[type(record)][0]}; only documents are "
                        "tokenised beforehand. Name the column of the text with data.text_key=COLUMN."
                    )
                read[number] += 1
                self._drain(intake, show=read[number] > skip)
                if read[number] <= skip:
                    continue
                held = is_heldout or (
                    not self.options.heldout_path
                    and hash_share(record.text) < self.options.heldout_fraction
                )
                batch.texts.append(record.text)
                batch.names.append(record.place)
                batch.heldout.append(held)
                size += len(record.text)
                if size >= BATCH_CHARACTERS:
                    batch.progress = (list(read), self.bad)
                    yield batch
                    batch, size = TextBatch(), 0
            self._drain(intake, show=True)
            if batch.texts:
                batch.progress = (list(read), self.bad)
                yield batch
        if not any(read):
            raise DataError(f"{self.sources[0][0].path} holds no usable record.")

    def _drain(self, intake: Intake, *, show: bool) -> None:
        """Count bad records, refuse them if so told, and let go of them: there may be millions."""
        if not intake.bad:
            return
        if self.options.on_bad_line == OnBadLine.ERROR:
            raise DataError(
                f"{intake.complaint()} Fix them, or set data.on_bad_line=skip to leave them out."
            )
        for row, reason in intake.bad if show else ():
            self._show_bad(f"{row.file} {row.place}", reason)
        self.bad += len(intake.bad)
        intake.bad.clear()

    def _show_bad(self, where: str, reason: str) -> None:
        if self.bad_shown < BAD_SHOWN:
            self.say(f"left out: {where}: {reason}")
        self.bad_shown += 1

    def _write(self, batch: TextBatch, encoded: TokenBatch) -> None:
        for where, reason in encoded.problems:
            if self.options.on_bad_line == OnBadLine.ERROR:
                raise DataError(f"{where}: {reason} Or set data.on_bad_line=skip.")
            self._show_bad(where, reason)
        self.not_encoded += len(encoded.problems)
        start = 0
        for held, length, size in zip(
            batch.heldout, encoded.lengths, encoded.text_bytes, strict=True
        ):
            if length:
                part = encoded.ids[start : start + length]
                self.writers["heldout" if held else "train"].add(part, size)
            start += length

    def _open_writers(self) -> None:
        for split, shards in self.manifest.shards.items():
            self.writers[split] = _Writer(
                self.out, f"{split}-{len(shards):05d}.bin", self.manifest.dtype
            )

    def _close_shards(self, read: list[int], bad: int) -> None:
        """Make both open shards durable, then say so in the manifest: a kill loses what came after."""
        manifest = self.manifest
        for split, writer in self.writers.items():
            shard = writer.close()
            if shard is not None:
                manifest.shards[split].append(shard)
        sync_dir(self.out)
        fault_point("tokenize_before_manifest")
        manifest.documents_read, manifest.bad = list(read), bad
        manifest.not_encoded = self.not_encoded
        manifest.seconds = self.seconds_before + time.monotonic() - self.started
        atomic_write_json(self.out / MANIFEST, manifest.to_json())


class _Writer:
    """One shard being written, under a name of its own until it is whole."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype) -> None:
        self.path, self.dtype = folder / name, dtype
        self.aside = folder / f".{name}.tmp"
        self.file = self.aside.open("wb")
        self.digest = hashlib.sha256()
        self.tokens = self.text_bytes = 0
        self.places: list[int] = []
        self.closed = False

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Append a document."""
        self.places.append(self.tokens)
        self.tokens += len(ids)
        self.text_bytes += text_bytes
        self._put(ids.astype(self.dtype, copy=False).tobytes())

    def close(self) -> Shard | None:
        """Make the shard durable; None if it is empty."""
        if not self.tokens:
            return self.discard()
        self._put(b"\0" * (places_at(self.tokens, self.dtype) - self.tokens * self.dtype.itemsize))
        self._put(np.array(self.places, "<i8").tobytes())
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.aside, self.path)
        self.closed = True
        return Shard(
            self.path.name, self.tokens, len(self.places), self.text_bytes, self.digest.hexdigest()
        )

    def discard(self) -> None:
        """Throw away what was written, unless the shard is whole."""
        if not self.closed:
            self.file.close()
            self.aside.unlink(missing_ok=True)
            self.closed = True

    def _put(self, data: bytes) -> None:
        self.digest.update(data)
        self.file.write(data)


def verify(folder: Path) -> Manifest:
    """Compare every shard with its size and checksum.

    Raises:
        DataError: naming the first damaged file.
    """
    manifest = Manifest.read(folder)
    for shards in manifest.shards.values():
        for shard in shards:
            check_shard(folder, shard, manifest.dtype, content=True)
    return manifest


def _settings(
    options: DataOptions, sources: list[tuple[Intake, bool]], shard_tokens: int
) -> dict[str, Any]:
    """Return what the tokens depend on: settings, and the files with their sizes."""
    names = "path heldout_path limit text_key document_separator line_pattern csv_quotes heldout_fraction"
    files = [f for intake, _ in sources for f in intake.files()]
    return {
        **{name: getattr(options, name) for name in names.split()},
        "columns": dict(options.columns),
        "on_bad_line": str(options.on_bad_line),
        "shard_tokens": shard_tokens,
        "files": {str(f): f.stat().st_size for f in files},
    }


def _begun(out: Path, fresh: Manifest) -> Manifest:
    """Return the manifest of an earlier call with equal settings, or the fresh one."""
    for aside in out.glob(".*.bin.tmp"):
        aside.unlink()
    if not (out / MANIFEST).exists():
        strange = [p.name for p in out.iterdir() if p.name not in (".lock", "tokenizer")]
        if [n for n in strange if not n.endswith(".bin")]:
            raise ConfigError(f"out={out} holds other files ({strange[0]}). Choose a new folder.")
        return fresh
    found = Manifest.read(out)
    if found.tokenizer != fresh.tokenizer:
        raise ConfigError(f"out={out} was begun with another tokenizer. Choose another out.")
    for key, value in fresh.settings.items():
        if found.settings.get(key) != value:
            raise ConfigError(
                f"out={out} was begun with {key}={found.settings.get(key)}, now it is {value}. Choose another out."
            )
    return found


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Keep a second job out of the folder."""
    fd = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"out={out} is being written by another process.") from None
        yield
    finally:
        os.close(fd)


def _start_child() -> None:
    """A terminal's Ctrl-C reaches the children too: the parent alone decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent()
