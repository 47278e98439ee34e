"""Recurrent language models in the manner of AWD-LSTM: the honest baseline that came before transformers.

Same data, loop, heads and report as every other architecture. A cache is the state of the recurrence, which does not
grow. What is left out: averaged SGD, activation regularisation, and states carried from one batch to the next.

Reference: Merity et al. 2017, arXiv 1708.02182 (dropped recurrent weights, one mask per sequence elsewhere, whole
embeddings dropped, tied weights).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from distllm.arch.abilities import Abilities
from distllm.arch.heads import HEADS, LMHead
from distllm.arch.joining import join_behind
from distllm.arch.options import TransformerOptions
from distllm.arch.reading import Reading
from distllm.arch.stack import embed, refuse
from distllm.errors import ConfigError
from distllm.layers.init import InitRules, init_parameters
from distllm.registry import register, unknown_name
from distllm.types import Batch, ModelOutput

State = tuple[Tensor, Tensor]
"""Hidden and cell state of a layer, each [batch, width]."""


@dataclass(kw_only=True, slots=True)
class LSTMOptions:
    """Shape of an LSTM language model."""

    name: str = "lstm"
    """Registry key of the architecture."""
    family: str = ""
    """Not used: there is one checkpoint family."""
    vocab_size: int = 4096
    """Number of token ids; at least the tokenizer's."""
    d_model: int = 256
    """Width of the embeddings and of the last layer, which the output matrix reads."""
    d_hidden: int = 512
    """Width of the layers before the last."""
    n_layers: int = 2
    """Number of layers."""
    max_seq_len: int = 4096
    """Longest sequence in tokens; nothing in the model depends on it."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    num_labels: int = 2
    """Outputs of a classification head."""
    dropout: float = 0.0
    """Probability of zeroing each channel of a layer's output, one mask for the whole sequence."""
    dropout_embedding: float = 0.0
    """Probability of leaving out each word of the vocabulary for one batch."""
    dropout_weights: float = 0.0
    """Probability of zeroing each weight from hidden state to hidden state."""
    init_std: float = 0.05
    """Standard deviation of the initial weights."""


class LSTMLayer(nn.Module):
    """One layer; dropout is on its output and on its recurrent weights."""

    def __init__(self, d_in: int, d_out: int, options: LSTMOptions) -> None:
        super().__init__()
        # Gates in the order input, forget, cell, output, one below the other.
        self.weight_ih = nn.Parameter(torch.empty(4 * d_out, d_in))
        self.weight_hh = nn.Parameter(torch.empty(4 * d_out, d_out))
        self.bias = nn.Parameter(torch.empty(4 * d_out))
        self.d_out = d_out
        self.dropout, self.dropout_weights = options.dropout, options.dropout_weights

    def forward(
        self, x: Tensor, state: State, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Run over `x` [batch, seq, d_in] from `state`; with `lengths` [batch] only over so many tokens of each row.

        Returns:
            (outputs [batch, seq, d_out], 0 behind a row's end; the state at the end of each row).
        """
        recurrent = self.weight_hh
        if self.training and self.dropout_weights:
            recurrent = F.dropout(recurrent, self.dropout_weights)
        weights = [self.weight_ih, recurrent, self.bias, torch.zeros_like(self.bias)]
        settings = (weights, True, 1, 0.0, self.training, False)
        if lengths is None:
            start = [s[None].contiguous() for s in state]
            out, hidden, cell = torch.lstm(x, start, *settings, True)
            return out, (hidden[0], cell[0])
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        start = [s[packed.sorted_indices][None] for s in state]
        out, hidden, cell = torch.lstm(packed.data, packed.batch_sizes, start, *settings)
        out, _ = pad_packed_sequence(packed._replace(data=out), True, total_length=x.shape[1])
        return out, (hidden[0][packed.unsorted_indices], cell[0][packed.unsorted_indices])


class LSTMState:
    """The state of all layers: [n_layers, 2, batch, widest layer]. Rows are kept and repeated as in a key/value cache."""

    def __init__(
        self, n_layers: int, batch_size: int, max_seq_len: int, width: int, dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        self.data = torch.zeros(n_layers, 2, batch_size, width, dtype=dtype, device=device)
        self.length, self.max_seq_len = 0, max_seq_len

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.data.shape[2]

    def read(self, layer: int, width: int) -> State:
        """Return the state of a layer."""
        hidden, cell = self.data[layer, :, :, :width]
        return hidden, cell

    @torch.no_grad()
    def write(self, layer: int, state: State) -> None:
        """Take over the state of a layer."""
        self.data[layer, :, :, : state[0].shape[-1]] = torch.stack(state).to(self.data.dtype)

    def drop_columns(self, num: int) -> None:
        """Forget that there were `num` columns of padding: the state does not hold them."""
        self.length -= num

    def select(self, rows: Tensor) -> LSTMState:
        """Keep the rows `rows` [num_rows] int64, in that order."""
        self.data = self.data.index_select(2, rows)
        return self

    def repeat(self, num: int) -> LSTMState:
        """Repeat every row `num` times, copies next to each other."""
        self.data = self.data.repeat_interleave(num, dim=2)
        return self


@register("arch")
class LSTM(nn.Module):
    """A recurrent language model. Its forward takes the keyword arguments every architecture takes."""

    Options = LSTMOptions
    abilities = Abilities(traceable=False)

    def __init__(self, options: LSTMOptions, head: str = "lm", seed: int = 0) -> None:
        """Build the model with initial weights that depend on `seed` and the parameters' names only.

        Args:
            options: the shape.
            head: as for a decoder.
            seed: of the initial weights.

        Raises:
            ConfigError: the head is unknown.
        """
        super().__init__()
        if head not in HEADS:
            raise ConfigError(unknown_name("head", head, HEADS))
        self.options, self.head_name = options, head
        shape = options.vocab_size, options.d_model
        self.embed = nn.Embedding(*shape, _weight=torch.empty(shape))
        widths = [options.d_model, *[options.d_hidden] * (options.n_layers - 1), options.d_model]
        self.layers = nn.ModuleList(
            LSTMLayer(d_in, d_out, options) for d_in, d_out in pairwise(widths)
        )
        self.dropout_embedding = options.dropout_embedding
        self.head = HEADS[head](
            _as_head_options(options), self.embed if options.tie_embeddings else None
        )
        init_parameters(self, seed)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segment_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        prefix_lengths: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_position_ids: Tensor | None = None,
        decoder_segment_ids: Tensor | None = None,
        encoder_states: Tensor | None = None,
        cache: LSTMState | None = None,
        compute_logits: bool = True,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [batch, seq] int64.
            attention_mask: [batch, seq], or [batch, cache.length + seq] with a cache; True on real tokens. Padding may
                be on either side.
            position_ids: not read: a recurrence knows where it is.
            segment_ids: [batch, seq] of packed rows; the state starts anew in every segment, 0 is padding.
            token_type_ids: must be None, as must prefix_lengths and all that is an encoder's or a second decoder's.
            prefix_lengths: must be None.
            inputs_embeds: [batch, seq, d_model] in place of `input_ids`.
            decoder_input_ids: must be None.
            decoder_attention_mask: must be None.
            decoder_position_ids: must be None.
            decoder_segment_ids: must be None.
            encoder_states: must be None.
            cache: from `new_cache`; the call goes on from it and moves it on.
            compute_logits: False stops at `last_hidden_state` and leaves the head to the caller.

        Raises:
            ValueError: an argument cannot be used by this architecture, or shapes do not fit.
        """
        refuse(
            "a recurrent",
            token_type_ids=token_type_ids,
            prefix_lengths=prefix_lengths,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_position_ids=decoder_position_ids,
            decoder_segment_ids=decoder_segment_ids,
            encoder_states=encoder_states,
        )
        x = self._embed(input_ids, inputs_embeds)
        past = 0 if cache is None else cache.length
        if segment_ids is not None and past:
            raise ValueError("segment_ids mark packed rows, which cannot be continued from a cache")
        segments = segment_ids
        new_mask = None if attention_mask is None else attention_mask[:, past:]
        if new_mask is not None and not bool(new_mask.all()):
            real = new_mask.long()
            segments = real if segments is None else segments * real
        hidden = (
            self._run_whole(x, cache) if segments is None else self._run_pieces(x, segments, cache)
        )
        if cache is not None:
            cache.length += x.shape[1]
        output = ModelOutput()
        if compute_logits:
            if segment_ids is not None and self.head_name in ("last", "classify"):
                raise ValueError(
                    "a verdict per row needs one sequence per row; segment_ids mark packing"
                )
            output = self.head(hidden, new_mask)
        output.last_hidden_state = hidden
        return output

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        drops = self.training and self.dropout_embedding
        if drops and inputs_embeds is None and input_ids is not None:
            weight = self.embed.weight
            kept = F.dropout(weight.new_ones(len(weight), 1), self.dropout_embedding)
            return F.embedding(input_ids, weight * kept)
        return embed(self.embed, input_ids, inputs_embeds)

    def _layers(self) -> list[LSTMLayer]:
        return [layer for layer in self.layers if isinstance(layer, LSTMLayer)]

    def _start(self, cache: LSTMState | None, number: int, x: Tensor) -> State:
        """Return the state that layer `number` starts from, a row for each of `x`."""
        width = self._layers()[number].d_out
        if cache is None:
            zeros = x.new_zeros(len(x), width)
            return zeros, zeros
        hidden, cell = cache.read(number, width)
        return hidden.to(x.dtype), cell.to(x.dtype)

    def _run_whole(self, x: Tensor, cache: LSTMState | None) -> Tensor:
        """Run rows without padding."""
        for number, layer in enumerate(self._layers()):
            x, state = layer(x, self._start(cache, number, x))
            if cache is not None:
                cache.write(number, state)
            x = self._drop(x, layer.dropout)
        return x

    def _run_pieces(self, x: Tensor, segments: Tensor, cache: LSTMState | None) -> Tensor:
        """Run every segment as a sequence of its own; what padding returns is 0."""
        batch, seq, _ = x.shape
        pieces = _cut(segments)
        y = x.new_zeros(len(pieces.lengths), int(pieces.lengths.max()), x.shape[-1])
        y = y.index_put((pieces.number, pieces.column), x.flatten(0, 1)[pieces.places])
        for number, layer in enumerate(self._layers()):
            before = self._start(cache, number, x)
            y, state = layer(y, tuple(s[pieces.row] for s in before), pieces.lengths)
            if cache is not None:
                # The state behind a row's last piece remains.
                hidden, cell = (
                    old.index_copy(0, pieces.row[pieces.is_last], new[pieces.is_last])
                    for old, new in zip(before, state, strict=True)
                )
                cache.write(number, (hidden, cell))
            y = self._drop(y, layer.dropout)
        out = y.new_zeros(batch * seq, y.shape[-1])
        out = out.index_put((pieces.places,), y[pieces.number, pieces.column])
        return out.view(batch, seq, -1)

    def _drop(self, x: Tensor, dropout: float) -> Tensor:
        """Drop whole channels of a sequence [batch, seq, width]."""
        if not (self.training and dropout):
            return x
        return x * F.dropout(x.new_ones(len(x), 1, x.shape[-1]), dropout)

    def blocks(self) -> Sequence[nn.Module]:
        """Return the layers, in order."""
        return list(self.layers)

    def shard_plan(self) -> Mapping[str, str]:
        """Return how each parameter may be split; recurrent weights stay whole."""
        head = {"head.weight": "vocab"} if isinstance(self.head, LMHead) else {}
        return {"embed.weight": "vocab", "layers.*": "whole", **head}

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how the parameter starts."""
        std = self.options.init_std
        return {
            **self.head.init_rules(self.options.d_model, std),
            "*.bias": ("constant", 0.0),
            "*": ("normal", std),
        }

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Write each response behind its prompt, padded on the right; see `joining.join_behind`."""
        return join_behind(prompts, responses, pad_id)

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> Reading:
        """Read prompts, to be continued by at most `room` tokens; see `arch/reading.py`."""
        return Reading(self, prompts, room, pad_id, dtype)

    def room_after(self, prompt_length: int) -> int:
        """Return how many response tokens there is room for behind a prompt."""
        return self.options.max_seq_len - prompt_length

    def new_cache(
        self, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> LSTMState:
        """Allocate the state of the recurrence."""
        width = max(layer.d_out for layer in self._layers())
        return LSTMState(self.options.n_layers, batch_size, max_seq_len, width, dtype, device)


class _Pieces(NamedTuple):
    """The segments of a batch as sequences of their own, in the rows' order."""

    places: Tensor
    """[tokens] of each real token in the flattened batch."""
    number: Tensor
    """[tokens] of the piece it belongs to."""
    column: Tensor
    """[tokens] its place within the piece."""
    lengths: Tensor
    """[pieces]."""
    row: Tensor
    """[pieces] of the batch that each comes from."""
    is_last: Tensor
    """[pieces] bool: no other piece of the same row follows."""


def _cut(segments: Tensor) -> _Pieces:
    """Find the runs of equal numbers in `segments` [batch, seq], runs of 0 left out."""
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    kept = segments.flatten() != 0
    places = kept.nonzero()[:, 0]
    run = (begins.flatten().cumsum(0) - 1)[places]
    _, number, lengths = run.unique_consecutive(return_inverse=True, return_counts=True)
    starts = lengths.cumsum(0) - lengths
    row = places[starts] // segments.shape[1]
    is_last = torch.ones_like(row, dtype=torch.bool)
    is_last[:-1] = row[1:] != row[:-1]
    column = places - places[starts][number]
    return _Pieces(places, number, column, lengths, row, is_last)


def _as_head_options(options: LSTMOptions) -> TransformerOptions:
    """Say what the heads, which are those of the transformers, must know."""
    return TransformerOptions(
        vocab_size=options.vocab_size, d_model=options.d_model, num_labels=options.num_labels
    )
