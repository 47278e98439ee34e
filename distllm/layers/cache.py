"""A static key/value cache: memory is taken once, every row writes the same column (pad prompts on the left)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distllm.layers.products import product_dtype


class KVCache:
    """Keys and values of all layers, [n_layers, 2, batch, n_kv_heads, max_seq_len, d_head].

    The model appends at column `length` and advances it once per call. `select` and `repeat` change the rows in place
    and return the cache.
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        max_seq_len: int,
        d_head: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        shape = (n_layers, 2, batch_size, n_kv_heads, max_seq_len, d_head)
        # As they are multiplied, so that no step widens them all.
        self.data = torch.zeros(shape, dtype=product_dtype(dtype, device), device=device)
        self.length = 0

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.data.shape[2]

    @property
    def max_seq_len(self) -> int:
        """Number of columns there is room for."""
        return self.data.shape[4]

    @torch.no_grad()
    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write `k`, `v` [batch, seq, n_kv_heads, d_head] of the new tokens.

        No gradient passes through a cache.

        Returns:
            (keys, values), each [batch, max_seq_len, n_kv_heads, d_head]: all columns, also those not written yet,
            which must be masked. A slice would be shorter, but every matrix product would copy it first.

        Raises:
            ValueError: there is no room, or the number of rows differs.
        """
        end = self.length + k.shape[1]
        if end > self.max_seq_len:
            raise ValueError(
                f"the cache has room for {self.max_seq_len} tokens; {self.length} are in it and "
                f"{k.shape[1]} more were given"
            )
        if k.shape[0] != self.batch_size:
            raise ValueError(f"the cache has {self.batch_size} rows, the input has {k.shape[0]}")
        keys, values = (half.transpose(1, 2) for half in self.data[layer].unbind())
        keys[:, self.length : end] = k
        values[:, self.length : end] = v
        return keys, values

    def advance(self, num_tokens: int) -> None:
        """Move `length` past the tokens that every layer has appended."""
        self.length += num_tokens

    def drop_columns(self, num: int) -> None:
        """Drop the first `num` columns: padding in all rows."""
        self.data = self.data[..., num:, :]
        self.length -= num

    def select(self, rows: Tensor) -> KVCache:
        """Keep the rows `rows` [num_rows] int64, in that order."""
        self.data = self.data.index_select(2, rows)
        return self

    def repeat(self, num: int) -> KVCache:
        """Repeat every row `num` times, copies next to each other."""
        self.data = self.data.repeat_interleave(num, dim=2)
        return self


class CrossCache(KVCache):
    """The cache of a decoder that reads an encoder: also the encoder's states, and what each block made of them.

    Every row of the encoder's input may stand for itself; a block's keys and values are computed once, at its first call.
    """

    def __init__(
        self,
        n_layers: int,
        batch_size: int,
        n_kv_heads: int,
        max_seq_len: int,
        d_head: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        super().__init__(n_layers, batch_size, n_kv_heads, max_seq_len, d_head, dtype, device)
        self.encoder_states: Tensor | None = None
        """[batch, source_seq, d_model]."""
        self.encoder_mask: Tensor | None = None
        """[batch, source_seq] bool."""
        self.cross: dict[int, tuple[Tensor, Tensor]] = {}
        """Block -> keys and values of the encoder's states, each [batch, source_seq, n_kv_heads, d_head]."""

    def select(self, rows: Tensor) -> CrossCache:
        """Keep the rows `rows` [num_rows] int64, in that order."""
        super().select(rows)
        self._map(lambda x: x.index_select(0, rows))
        return self

    def repeat(self, num: int) -> CrossCache:
        """Repeat every row `num` times, copies next to each other."""
        super().repeat(num)
        self._map(lambda x: x.repeat_interleave(num, dim=0))
        return self

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.encoder_states is not None:
            self.encoder_states = change(self.encoder_states)
        if self.encoder_mask is not None:
            self.encoder_mask = change(self.encoder_mask)
        self.cross = {layer: (change(k), change(v)) for layer, (k, v) in self.cross.items()}
