"""Texts to token ids in several processes, in order. What is done with them is `pipeline/tokenize.py`'s business."""

from __future__ import annotations

import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np

from distllm.data.tokenizer import encode_texts, load_tokenizer
from distllm.errors import DataError

_AHEAD = 3
"""Batches in the queue for each process: enough to keep it busy, few enough to keep memory small."""


@dataclass(slots=True)
class TextBatch:
    """Documents that are encoded together."""

    texts: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    """Where each was read."""
    heldout: list[bool] = field(default_factory=list)
    progress: tuple[list[int], int] = field(default_factory=lambda: ([], 0))
    """Records consumed by path, and bad ones so far, once this batch is done."""


@dataclass(slots=True)
class TokenBatch:
    """What became of a `TextBatch`."""

    ids: np.ndarray
    """Of all documents one after the other, each closed by the end token."""
    lengths: list[int]
    """Ids of each document, the end token included; 0 for one that is empty or cannot be encoded."""
    text_bytes: list[int]
    problems: list[tuple[str, str]]
    """(where, why) of documents that cannot be encoded."""


def encode_batch(tok: Any, eos_id: int, dtype: np.dtype, batch: TextBatch) -> TokenBatch:
    """Encode one batch; a document that cannot be encoded does not spoil the others."""
    problems = []
    try:
        encoded = encode_texts(tok, batch.texts)
    except DataError:
        encoded = []
        for text, name in zip(batch.texts, batch.names, strict=True):
            try:
                encoded += encode_texts(tok, [text])
            except DataError as error:
                encoded.append([])
                problems.append((name, str(error)))
    rows = [[*ids, eos_id] if ids else [] for ids in encoded]
    flat = np.fromiter((i for row in rows for i in row), dtype, sum(map(len, rows)))
    sizes = [len(text.encode("utf-8", "surrogatepass")) for text in batch.texts]
    return TokenBatch(flat, [len(row) for row in rows], sizes, problems)


def encode_in_order(
    batches: Iterator[TextBatch],
    tokenizer_dir: str,
    eos_id: int,
    dtype: np.dtype,
    num_workers: int,
    start_child: Callable[[], None],
) -> Generator[tuple[TextBatch, TokenBatch], None, None]:
    """Encode `batches` in `num_workers` processes, or in this one if that is 1; results come in the batches' order.

    `start_child` is called first in each process.
    """
    if num_workers == 1:
        tok = load_tokenizer(tokenizer_dir)
        for batch in batches:
            yield batch, encode_batch(tok, eos_id, dtype, batch)
        return
    context = multiprocessing.get_context("spawn")
    start = partial(_start, tokenizer_dir, start_child)
    with ProcessPoolExecutor(num_workers, context, initializer=start) as pool:
        waiting: deque[tuple[TextBatch, Any]] = deque()
        try:
            for batch in batches:
                waiting.append((batch, pool.submit(_encode, eos_id, dtype, batch)))
                if len(waiting) >= _AHEAD * num_workers:
                    done, future = waiting.popleft()
                    yield done, future.result()
            while waiting:
                done, future = waiting.popleft()
                yield done, future.result()
        finally:
            for _, future in waiting:
                future.cancel()


_tokenizer: Any = None


def _start(tokenizer_dir: str, start_child: Callable[[], None]) -> None:
    global _tokenizer
    start_child()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    _tokenizer = load_tokenizer(tokenizer_dir)


def _encode(eos_id: int, dtype: np.dtype, batch: TextBatch) -> TokenBatch:
    return encode_batch(_tokenizer, eos_id, dtype, batch)
