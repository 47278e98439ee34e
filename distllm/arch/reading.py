"""How a batch of prompts is read and continued token by token: what the sampler asks of a model, `model.read(...)`.

Which token comes next, and when a response ends, is the sampler's business (`generation/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Reading:
    """Prompts and responses as one sequence, padded on the left, behind one cache. Rows can be dropped and repeated."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        room: int,
        pad_id: int,
        dtype: torch.dtype,
    ) -> None:
        """Read the prompts.

        Args:
            model: any that takes `cache` and `position_ids`.
            prompts: token ids, at least one per prompt.
            room: how many tokens will be fed at most.
            pad_id: fills the rectangle; masked.
            dtype: the one heavy work runs in.
        """
        self.model, self.device = model, model.embed.weight.device
        width = max(map(len, prompts))
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        self.pads = width - lengths
        self.any_pad = bool(self.pads.any())
        self.cache = model.new_cache(len(prompts), width + room, dtype, self.device)
        ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts])
        self.last = self._call(ids.to(self.device), self._first_positions(width))
        """[rows, d_model]: the state that the next token is read from."""

    def feed(self, tokens: Tensor) -> Tensor:
        """Append one token per row, [rows] int64; return the new `last`."""
        self.last = self._call(tokens[:, None], self._next_positions())
        return self.last

    def _call(self, ids: Tensor, position_ids: Tensor | None) -> Tensor:
        mask = None
        if self.any_pad:
            columns = torch.arange(self.cache.length + ids.shape[1], device=self.device)
            mask = columns >= self.pads[:, None]
        out = self.model(
            ids, mask, position_ids=position_ids, cache=self.cache, compute_logits=False
        )
        return out.last_hidden_state[:, -1]

    def _first_positions(self, width: int) -> Tensor | None:
        """Return the prompts' positions; None lets the model derive them from the mask."""
        return None

    def _next_positions(self) -> Tensor:
        return (self.cache.length - self.pads)[:, None]

    @property
    def is_full(self) -> bool:
        """True when the cache has as many columns as the model can take."""
        return self.cache.length >= self.model.options.max_seq_len

    def repeat(self, num: int) -> None:
        """Repeat every row `num` times, copies next to each other."""
        self.cache = self.cache.repeat(num)
        self.last = self.last.repeat_interleave(num, dim=0)
        self.pads = self.pads.repeat_interleave(num)

    def select(self, rows: Tensor) -> None:
        """Keep the rows `rows` [num_rows] int64, at least one, and drop columns that are padding in all of them."""
        self.pads, self.last = self.pads[rows], self.last[rows]
        # Columns are not positions: behind a long pad, a short prompt would run out of them first.
        margin = int(self.pads.min())
        self.cache.drop_columns(margin)
        self.pads = self.pads - margin
        self.any_pad = bool(self.pads.any())
        self.cache = self.cache.select(rows)


class BlankReading(Reading):
    """GLM's: the prompt with a blank behind it is part A, what is fed is part B at the blank's place."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        room: int,
        pad_id: int,
        dtype: torch.dtype,
    ) -> None:
        options = model.options
        self.places = torch.tensor([len(p) for p in prompts], device=model.embed.weight.device)
        self.num_said = 1
        framed = [[*p, options.blank_id, options.start_id] for p in prompts]
        super().__init__(model, framed, room, pad_id, dtype)

    def _first_positions(self, width: int) -> Tensor:
        columns = (torch.arange(width, device=self.device) - self.pads[:, None]).clamp(min=0)
        place = torch.minimum(columns, self.places[:, None])
        return torch.stack((place, columns - place), dim=1)

    def _next_positions(self) -> Tensor:
        self.num_said += 1
        return torch.stack((self.places, torch.full_like(self.places, self.num_said)), dim=1)[
            ..., None
        ]

    def repeat(self, num: int) -> None:
        """Repeat every row `num` times, copies next to each other."""
        super().repeat(num)
        self.places = self.places.repeat_interleave(num)

    def select(self, rows: Tensor) -> None:
        """Keep the rows `rows` [num_rows] int64, at least one."""
        super().select(rows)
        self.places = self.places[rows]


class CrossReading:
    """An encoder-decoder's: prompts go to the encoder once, the decoder begins with its start token."""

    is_full = False
    """Responses have a cache of their own, which is large enough."""

    def __init__(
        self,
        model: Any,
        prompts: Sequence[Sequence[int]],
        room: int,
        pad_id: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, device = model, model.embed.weight.device
        self.cache = model.new_cache(len(prompts), 1 + room, dtype, device)
        batch = model.join(prompts, [[]] * len(prompts), pad_id).to(device)
        mask = batch.attention_mask
        out = model(
            batch.input_ids,
            None if bool(mask.all()) else mask,
            decoder_input_ids=batch.decoder_input_ids,
            cache=self.cache,
            compute_logits=False,
        )
        self.last = out.last_hidden_state[:, -1]

    def feed(self, tokens: Tensor) -> Tensor:
        """Append one token per row, [rows] int64; return the new `last`."""
        out = self.model(decoder_input_ids=tokens[:, None], cache=self.cache, compute_logits=False)
        self.last = out.last_hidden_state[:, -1]
        return self.last

    def repeat(self, num: int) -> None:
        """Repeat every row `num` times, copies next to each other."""
        self.cache = self.cache.repeat(num)
        self.last = self.last.repeat_interleave(num, dim=0)

    def select(self, rows: Tensor) -> None:
        """Keep the rows `rows` [num_rows] int64, at least one."""
        self.cache, self.last = self.cache.select(rows), self.last[rows]
