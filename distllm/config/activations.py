"""Closed formulas for what one micro-batch holds on one process between forward and backward, and at the worst moment.

Nothing is run or traced: every term is a count of numbers times their size, read off the code of the block, the norms,
attention and the chunked loss, and each says which tensor it is. Weights, gradients and moments are in `memory.py`.

Sizes: `tokens` = batch x seq; d = d_model, f = d_ff, q = n_heads x d_head, k = n_kv_heads x d_head. Numbers that heavy
arithmetic makes take `e` bytes (4 in fp32, 2 in bf16); the residual stream and norms' internals are always fp32.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from distllm.config.shapes import ModelShape

_FP32 = 4
CHUNK_BYTES, SLICE_BYTES = 16 * 2**20, 2**20
"""Logits of one chunk of the loss, and the part of it that is widened to fp32 at a time (`layers/cross_entropy.py`)."""
LONGEST_BLOCKED = 1024
"""Up to this length attention on a CPU keeps its probabilities (`layers/attention.py`)."""
_RNG_STATE = 5056
"""Bytes of the CPU generator's state, which recomputation keeps per block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """What one process computes at a time, and how."""

    batch: int
    """Sequences."""
    seq: int
    """Tokens per sequence."""
    element: int
    """Bytes of a number of the heavy arithmetic."""
    packed: bool = True
    """Rows hold several documents: attention gets an explicit bias, positions differ between rows."""
    on_cpu: bool = True
    checkpointing: str = "none"
    compiled: bool = False
    casts_blocks: bool = True
    """Weights of blocks are kept in fp32 and copied to the dtype of the arithmetic where they are used (autocast)."""
    casts_head: bool = True
    """The same for the output matrix."""
    tp: int = 1
    """Processes that split each matrix product; with sequence parallel norms the residual stream is split too."""
    stream: int = _FP32
    """Bytes of a number of the residual stream. Ours is always fp32; frameworks that cast whole models keep 2."""
    selected: float = 1.0
    """Share of the products' results that selective checkpointing keeps. Ours keeps all."""

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch."""
        return self.batch * self.seq

    @property
    def head_copies(self) -> int:
        """Bytes per weight of the output matrix's copy in the dtype of the arithmetic."""
        return self.element if self.element < _FP32 and self.casts_head else 0

    @property
    def head_gradient(self) -> int:
        """Bytes of a number of the output matrix's gradient, once it is all there: as many as its weight has."""
        return _FP32 if self.casts_head else self.element

    @property
    def copies(self) -> int:
        """Bytes per weight of a block's copies in the dtype of the arithmetic."""
        return self.element if self.element < _FP32 and self.casts_blocks else 0


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes that one block holds, by when the backward gives them back."""

    attention: int
    """The first norm's input, attention's internals and the input of its output projection."""
    feed_forward: int
    """The second norm's input, the feed-forward layer's internals."""
    copies: int
    """Copies of the block's weights in the dtype of the arithmetic."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.attention + self.feed_forward + self.copies


def block_held(shape: ModelShape, work: MicroBatch) -> Held:
    """Count what one block holds when nothing of it is recomputed."""
    own, e = work.tokens // work.tp, work.element
    norm = _norm_held(own, shape.d_model, work)
    into = 0 if work.compiled else e * work.tokens * shape.d_model  # a compiler recomputes norms
    # Gated: gate, its activation, up and the product of both; plain: up and its activation. relu needs its result only,
    # and a compiler recomputes what costs no product.
    parts = 4 if shape.gated else 2
    parts = parts // 2 if work.compiled else parts - shape.activation_keeps_result
    inner = parts * e * work.tokens * shape.d_ff // work.tp
    inner += e * work.tokens * shape.adapter_width
    dropped = (e if work.on_cpu else 1) * own * shape.d_model if shape.has_dropout else 0
    # Norms behind attention and feed-forward keep what those return.
    behind = (e * own * shape.d_model + _FP32 * own) if shape.norms_outputs else 0
    return Held(
        attention=norm + into + _attention_held(shape, work) + dropped + behind,
        feed_forward=norm + into + inner + dropped + behind,
        copies=work.copies * (shape.block_multiplied - shape.held_in_4bit) // work.tp,
    )


def _norm_held(tokens: int, d: int, work: MicroBatch) -> int:
    """Input and reciprocal norm; outside the CPU's own kernel also the scaled input and three numbers per token."""
    held = tokens * (work.stream * d + _FP32)
    return held if work.on_cpu or work.compiled else held + _FP32 * tokens * (d + 2)


def _attention_held(shape: ModelShape, work: MicroBatch) -> int:
    e, tokens = work.element, work.tokens
    q, k = shape.q_width // work.tp, shape.kv_width // work.tp
    held = e * tokens * (q + 2 * k)  # queries, keys and values, rotated and laid out by heads
    # The mixed values: attention's result, and the output projection's input.
    held += e * tokens * q
    heads = shape.n_heads // work.tp
    if shape.norms_heads:  # the projected queries and keys, and a reciprocal norm for each head
        held += e * tokens * (q + k) + _FP32 * tokens * (q + k) // shape.d_head
    if _keeps_probabilities(work):
        return held + e * work.batch * heads * visible_pairs(work.seq)
    return held + _FP32 * tokens * heads  # log-sum-exp of a fused kernel


def kept_by_recomputation(shape: ModelShape, work: MicroBatch) -> int:
    """Count what a block holds until its backward, when what is missing then is computed again."""
    held = work.stream * work.tokens // work.tp * shape.d_model  # its input
    held += _RNG_STATE if work.on_cpu else 0
    if work.checkpointing != "selective":
        return held
    q, k, heads = (n // work.tp for n in (shape.q_width, shape.kv_width, shape.n_heads))
    # Results of products: queries, keys, values, gate and up are cut by tp; the output projection's and down's are sums
    # of whole rows. Attention written out in products is computed again; a fused kernel's result is kept.
    inner = (2 if shape.gated else 1) * shape.d_ff // work.tp
    products = work.element * work.tokens * (q + 2 * k + inner + 2 * shape.d_model)
    held += int(work.selected * products)
    if not _keeps_probabilities(work):
        held += work.tokens * (work.element * q + _FP32 * heads)
    return held


def _keeps_probabilities(work: MicroBatch) -> bool:
    return work.on_cpu and 1 < work.seq <= LONGEST_BLOCKED


def _rows_per_block(seq: int) -> int:
    return max(64, -(-seq // 128) * 32)


def visible_pairs(seq: int) -> int:
    """Count query-key pairs of causal attention in blocks of queries that meet the keys up to their own end."""
    rows = _rows_per_block(seq)
    ends = [min(start + rows, seq) for start in range(0, seq, rows)]
    return sum((end - start) * end for start, end in zip(range(0, seq, rows), ends, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """One moment of a step that can be the worst."""

    name: str
    activations: int
    logits: int
    blocks: int
    """Blocks whose backward is not over yet."""
    in_backward: bool = True
    """False up to the loss, while no gradient of this micro-batch exists."""
    part: int = 0
    """Weights of the block at work that have their gradient."""
    rest: int = 0
    """Weights outside the blocks that have their gradient."""

    @property
    def total(self) -> int:
        """Bytes without gradients."""
        return self.activations + self.logits


def moments(shape: ModelShape, work: MicroBatch) -> list[Moment]:
    """List the moments of forward and backward that can be the worst one.

    The gradient that the loss gives a tied embedding waits, as a temporary, for the embedding's own at the very end.
    """
    e, d, tokens = work.element, shape.d_model, work.tokens
    stream = work.stream * tokens // work.tp * d
    block = block_held(shape, work)
    recomputes = work.checkpointing != "none"
    kept = kept_by_recomputation(shape, work) if recomputes else block.total
    blocks = shape.n_layers * kept
    bias = e * work.batch * work.seq**2 if work.packed else 0
    tables = 2 * e * (tokens if work.packed else work.seq) * shape.d_head
    shared = tables + (bias if recomputes or not _keeps_probabilities(work) else 0)
    final = tokens * (
        work.stream * d + _FP32
    )  # outside the blocks every process holds whole sequences
    cached = shape.n_layers * block.copies if recomputes else 0
    hidden = e * tokens * d

    head = 0 if shape.is_frozen else work.head_gradient * shape.head_multiplied // work.tp
    waiting = head if shape.tied else 0
    loss_forward, loss_backward = loss_bytes(shape, work)
    inner = e * tokens * shape.d_ff // work.tp
    # The block at work holds everything; of what was kept for it only the last product's result is left, unread.
    again = block.total - kept if recomputes else 0
    again += hidden if work.checkpointing == "selective" else 0
    norm_temporaries = 3 * _FP32 * tokens * d + (hidden if e < _FP32 else 0)

    # Weights that have their gradient.
    head_done = 0 if shape.tied or shape.is_frozen else shape.head_multiplied
    down = shape.d_model * shape.d_ff
    trained = sum(map(math.prod, shape.trained_block))
    half = down * (3 if shape.gated else 2) + shape.q_width * shape.d_model

    embedded = work.head_gradient * shape.embedding_multiplied // work.tp + 2 * waiting
    embedded = 0 if shape.is_frozen else embedded

    layers = shape.n_layers
    all_blocks = blocks + shared
    found = [
        Moment(name="loss, forward", activations=all_blocks + final + hidden + cached,
               logits=loss_forward, blocks=layers, in_backward=False),
        Moment(name="loss, backward", activations=all_blocks + final, logits=loss_backward,
               blocks=layers, in_backward=False),
        Moment(name="final norm, backward", activations=all_blocks + final + norm_temporaries,
               logits=waiting, blocks=layers, rest=head_done),
        Moment(name="embedding, backward", activations=shared,
               logits=embedded or stream,
               blocks=0, rest=head_done),
    ]  # fmt: skip
    # From block to block held memory falls and gradients grow, evenly: only the ends can be the worst. The blocks next to
    # them count as ends, because what an engine sends behind a block's backward begins and stops there.
    ends = {layers: "last", layers - 1: "second-last", 2: "second", 1: "first"}
    for number, name in ends.items():
        if not 1 <= number <= layers:
            continue
        held = number * kept + again + shared
        found += [
            Moment(name=f"{name} feed-forward, backward",
                   activations=held + stream + 2 * inner - work.copies * down // work.tp,
                   logits=waiting, blocks=number, part=min(down, trained), rest=head_done),
            Moment(name=f"{name} attention, backward",
                   activations=held - block.feed_forward + stream
                   + _attention_backward(shape, work),
                   logits=waiting, blocks=number, part=min(half, trained), rest=head_done),
        ]  # fmt: skip
    return found


def _attention_backward(shape: ModelShape, work: MicroBatch) -> int:
    """Count the temporaries of attention's backward at its worst."""
    e, tokens = work.element, work.tokens
    q, k = shape.q_width // work.tp, shape.kv_width // work.tp
    # The gradient that comes in takes the place of the mixed values, whose last reader has run.
    outgoing = e * tokens * (q + 2 * k)
    if not _keeps_probabilities(work):
        return outgoing
    starts = range(0, work.seq, _rows_per_block(work.seq))
    last = work.seq - starts[-1]
    # Of one block of queries: gradients of probabilities and of scores, and the first of the next block beside them.
    pairs = 2 * last * work.seq
    if len(starts) > 1:
        pairs += _rows_per_block(work.seq) * starts[-1]
    slices = 2 * e * work.batch * last * q
    return outgoing + slices + e * work.batch * (shape.n_heads // work.tp) * pairs


def loss_bytes(shape: ModelShape, work: MicroBatch) -> tuple[int, int]:
    """Count what the chunked loss takes at its worst: (in forward, in backward).

    Under tensor parallel it is `engines/vocabulary_parallel.py`, which widens a whole chunk at a time.
    """
    e, tokens, vocab = work.element, work.tokens, shape.vocab_size // work.tp
    matrix, hidden = vocab * shape.d_model, e * tokens * shape.d_model
    trained = 0 if shape.is_frozen else matrix
    rows = min(tokens, max(1, CHUNK_BYTES // (vocab * e)))
    part = min(rows, max(1, SLICE_BYTES // (vocab * _FP32)))
    chunk = rows * vocab * e
    fixed = hidden + _FP32 * trained + work.head_copies * matrix
    following = min(rows, tokens - rows) * vocab * e
    if work.tp > 1:
        # Scores, their distance to the highest and its exponential; or scores, the gradient and its product.
        wide = _FP32 * rows * vocab
        forward = fixed + max(3 * wide + following, wide + chunk + e * matrix)
    else:
        # Beside a chunk: its widened slices, or the next chunk, or its share of the matrix's gradient.
        slices = (2 if e < _FP32 else 1) * _FP32 * part * vocab
        forward = fixed + chunk + max(slices, following, e * trained)
    backward = 2 * hidden + (_FP32 + work.head_gradient) * trained
    return forward, backward
