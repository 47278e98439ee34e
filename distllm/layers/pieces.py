"""Documents of packed or padded rows laid end to end, the form in which variable-length kernels want them.

All tokens of a call form one stream. A piece is what sees itself and nothing else: a document, or the padding of a row. A
prefix that all of its document sees is a second set of pieces: prefix tokens see the prefix both ways, all others see
causally, so two calls of a causal kernel give a prefix mask exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(slots=True)
class Pieces:
    """Where pieces begin and end; piece i of the queries sees piece i of the keys."""

    cu_queries: Tensor
    """[num_pieces + 1] int32: the first query of each piece, and the end."""
    cu_keys: Tensor
    max_queries: int
    """Tokens of the longest piece."""
    max_keys: int
    order_queries: Tensor | None = None
    """[tokens] int64: which token of the flattened batch comes next; None = they lie in order."""
    order_keys: Tensor | None = None
    prefix: Pieces | None = None
    """The prefixes alone, whose tokens see each other in both directions."""


def cut(
    shape: tuple[int, int, int],
    queries: Tensor | None,
    keys: Tensor | None,
    prefix: Tensor | None,
    device: torch.device,
) -> Pieces:
    """Find the pieces of a batch. On a GPU this waits for the queue, once per forward.

    Args:
        shape: (batch, seq, kv_seq).
        queries: [batch, seq] int64 segment ids, 0 = padding; None = every row is one document.
        keys: [batch, kv_seq], likewise.
        prefix: [batch, kv_seq] bool: keys that all of their segment sees (then `queries` and `keys` are the same tokens).
        device: where to put new tensors.
    """
    batch, seq, kv_seq = shape
    if queries is None and keys is None and prefix is None:
        rows = torch.arange(batch + 1, dtype=torch.int32, device=device)
        return Pieces(rows * seq, rows * kv_seq, seq, kv_seq)
    if queries is None:
        queries = torch.ones(batch, seq, dtype=torch.int64, device=device)
    if keys is None:
        keys = torch.ones(batch, kv_seq, dtype=torch.int64, device=device)
    width = 2 + int(torch.maximum(queries.max(), keys.max()))
    marks, key_marks = _marks(queries, width), _marks(keys, width)
    found = _count(marks, key_marks, batch * width)
    found.order_queries, found.order_keys = _order(marks), _order(key_marks)
    if prefix is not None:
        first = torch.argsort(marks, stable=True)
        chosen = first[prefix.flatten()[first]]
        found.prefix = _count(marks[chosen], marks[chosen], batch * width)
        found.prefix.order_queries = found.prefix.order_keys = chosen
    return found


def run(
    kernel: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pieces: Pieces,
    *,
    causal: bool,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Let a variable-length kernel attend; shapes as in `attention.attention`.

    Args:
        kernel: called as `kernel(q, k, v, pieces, causal=, scale=, window=, softcap=)` on [tokens, heads, d_head].
        q: queries; keys and values follow.
        k: keys.
        v: values.
        pieces: of this batch.
        causal: tokens see no later ones of their piece, but for the prefix.
        scale: factor on the dot products.
        window: tokens less than this far away are seen; None = all.
        softcap: see `attention.attention`.
    """
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))

    def once(part: Pieces, causal: bool) -> Tensor:
        queries = q if part.order_queries is None else q[part.order_queries]
        keys, values = (x if part.order_keys is None else x[part.order_keys] for x in (k, v))
        return kernel(
            queries, keys, values, part, causal=causal, scale=scale, window=window, softcap=softcap
        )

    out = once(pieces, causal)
    if pieces.order_queries is not None:
        out = torch.zeros_like(q).index_copy(0, pieces.order_queries, out)
    if pieces.prefix is not None:
        order = pieces.prefix.order_queries
        assert order is not None
        out = out.index_copy(0, order, once(pieces.prefix, False))
    return out.view(shape)


def _marks(segments: Tensor, width: int) -> Tensor:
    """Number all segments of all rows, padding last within its row: [tokens]."""
    padding_last = segments.where(segments != 0, width - 1)
    rows = torch.arange(len(segments), device=segments.device)[:, None]
    return (rows * width + padding_last).flatten()


def _order(marks: Tensor) -> Tensor | None:
    if not bool((marks[1:] < marks[:-1]).any()):
        return None
    return torch.argsort(marks, stable=True)


def _count(marks: Tensor, key_marks: Tensor, num: int) -> Pieces:
    sizes, key_sizes = (torch.bincount(m, minlength=num) for m in (marks, key_marks))
    kept = (sizes > 0) | (key_sizes > 0)
    sizes, key_sizes = sizes[kept], key_sizes[kept]
    starts, key_starts = (F.pad(s.cumsum(0), (1, 0)).int() for s in (sizes, key_sizes))
    return Pieces(starts, key_starts, int(sizes.max()), int(key_sizes.max()))
