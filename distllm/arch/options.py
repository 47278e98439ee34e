"""Switches of the one transformer block, shared by every architecture that is built from it.

An architecture's own options class inherits these. Which values make which checkpoint family is in `arch/hf/`, what a
switch does is in `block.py`, `stack.py` and `layers/`. Members of the enumerations are named as they are written, because
YAML files name members.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch

from distllm.errors import ConfigError
from distllm.layers.attention_kernels import Need


class Norm(StrEnum):
    """Kind of normalisation."""

    rms = "rms"
    layer = "layer"


class Placement(StrEnum):
    """Where a block normalises."""

    pre = "pre"
    post = "post"
    sandwich = "sandwich"
    output = "output"


class Position(StrEnum):
    """How a model knows the order of its tokens."""

    rotary = "rotary"
    learned = "learned"
    sinusoidal = "sinusoidal"
    relative = "relative"
    none = "none"


class RopeStyle(StrEnum):
    """Which channels of a head are rotated together."""

    half = "half"
    interleaved = "interleaved"


class QKNorm(StrEnum):
    """What the normalisation of queries and keys spans."""

    none = "none"
    head = "head"
    full = "full"


class Activation(StrEnum):
    """Non-linearity of the feed-forward layer."""

    silu = "silu"
    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    relu = "relu"
    relu2 = "relu2"


class LayerType(StrEnum):
    """How far a block looks."""

    full = "full"
    window = "window"


class Pooling(StrEnum):
    """Which state stands for a sequence."""

    first = "first"
    last = "last"
    mean = "mean"


class Pooler(StrEnum):
    """What stands between the pooled state and a verdict."""

    none = "none"
    tanh = "tanh"
    transform = "transform"


@dataclass(kw_only=True, slots=True)
class TransformerOptions:
    """Shape and switches of a transformer; the defaults are Llama's."""

    name: str = ""
    """Registry key of the architecture."""
    family: str = ""
    """Checkpoint family to write on export (`llama`, `gpt2`, ...); empty takes the first that can hold the model."""
    vocab_size: int = 4096
    """Number of token ids; at least the tokenizer's."""
    d_model: int = 256
    """Width of the residual stream."""
    n_layers: int = 4
    """Number of blocks."""
    n_heads: int = 4
    """Query heads per block."""
    n_kv_heads: int = 2
    """Key/value heads per block; each serves n_heads / n_kv_heads query heads. Fewer make the cache smaller."""
    d_head: int | None = None
    """Width of one head, even where positions are rotary. None = d_model / n_heads."""
    d_ff: int = 704
    """Inner width of the feed-forward layer (three matrices of d_model x d_ff if `gated`, else two)."""
    max_seq_len: int = 512
    """Longest sequence, in tokens, prompt and response together."""
    norm: Norm = Norm.rms
    """`rms` (no mean is taken off) or `layer`."""
    norm_eps: float = 1e-5
    """Added to the mean square inside each norm."""
    norm_gain: bool = True
    """Norms have a learned gain."""
    norm_gain_offset: float = 0.0
    """Added to the learned gain; 1 in Gemma, whose gains start at 0."""
    norm_bias: bool = True
    """Layer norms have a learned shift."""
    norm_placement: Placement = Placement.pre
    """`pre` normalises what enters attention and feed-forward, `post` the sum behind them, `output` what they return,
    `sandwich` both what enters and what they return."""
    skip_first_norm: bool = False
    """The first block's attention gets its input as it is (it was normalised behind the embedding)."""
    embedding_norm: bool = False
    """Normalise the sum of the embeddings."""
    embedding_scale: float = 1.0
    """Factor on the token embeddings; sqrt(d_model) in Gemma, rounded to the dtype of the weights."""
    position: Position = Position.rotary
    """`rotary`, `learned`, `sinusoidal` (fixed), `relative` (a learned bias per distance bucket and head) or `none`."""
    position_offset: int = 0
    """Rows of the position table that come before the first position (2 in RoBERTa and BART)."""
    relative_buckets: int = 32
    """position=relative: number of distance buckets."""
    relative_max_distance: int = 128
    """position=relative: distances from here on share the last bucket."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths; larger values suit longer sequences."""
    rope_local_theta: float | None = None
    """The same for blocks of type `window`, which then take no `rope_scaling`; None = as the others."""
    rope_style: RopeStyle = RopeStyle.half
    """`half` pairs channel j with j + d/2, `interleaved` 2j with 2j + 1."""
    rope_sign: int = 1
    """1, or -1 to turn the other way."""
    rope_fraction: float = 1.0
    """Share of each head's channels that is rotated, counted from the first."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """How wavelengths are stretched for longer contexts: `rope_type` (linear, llama3, yarn) and its numbers, named as
    in Hugging Face's rope_parameters. Empty = not at all."""
    window: int | None = None
    """Blocks of type `window` see tokens less than this far away."""
    layer_types: list[str] = field(default_factory=lambda: ["full"])
    """`full` or `window` for each block; repeated until every block has one."""
    qk_norm: QKNorm = QKNorm.none
    """Normalise queries and keys: `none`, each `head`, or all heads together (`full`)."""
    qk_norm_after_rope: bool = False
    """Rotate first, then normalise."""
    attention_scale: float | None = None
    """Factor on the dot products; None = 1 / sqrt(d_head)."""
    attention_softcap: float | None = None
    """Squash attention scores to (-cap, cap) by cap * tanh(score / cap)."""
    attention_sinks: bool = False
    """One learned logit per head takes part in the softmax and is dropped behind it."""
    qkv_bias: bool = False
    """Query, key and value projections have a bias."""
    out_bias: bool = False
    """The projection behind attention has a bias."""
    gated: bool = True
    """Feed-forward multiplies the activated part by a second one (SwiGLU, GeGLU)."""
    activation: Activation = Activation.silu
    """`silu`, `gelu` (exact), `gelu_tanh`, `relu` or `relu2` (its square)."""
    ff_bias: bool = False
    """Feed-forward matrices have a bias."""
    num_experts: int = 0
    """Feed-forward layers beside each other, of which a router picks some for every token; 0 = one dense layer."""
    experts_per_token: int = 2
    """How many experts each token goes through."""
    d_expert: int | None = None
    """Inner width of one expert; None = d_ff."""
    dense_layers: list[int] = field(default_factory=list)
    """Blocks that keep a dense feed-forward layer of width d_ff, counted from 0."""
    router_top_first: bool = False
    """Softmax over the chosen experts only (GPT-OSS); else over all of them before choosing (Qwen3)."""
    router_renormalise: bool = True
    """Make the weights of the chosen experts sum to 1, where the softmax was over all."""
    router_bias: bool = False
    """The router's scores have a bias."""
    expert_bias: bool = False
    """Experts have biases."""
    expert_clamp: float | None = None
    """GPT-OSS: limit gate and up to this, then gate * sigmoid(expert_alpha * gate) * (up + 1). None = activation(gate) * up."""
    expert_alpha: float = 1.702
    """See `expert_clamp`."""
    balance_coef: float = 0.001
    """Weight of the loss that spreads tokens over experts, per sequence, averaged over blocks."""
    router_z_coef: float = 0.0
    """Weight of the loss that keeps router scores small, per sequence, averaged over blocks; 0.001 in ST-MoE."""
    token_types: int = 0
    """Rows of the token-type embedding (2 in BERT); 0 = there is none."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output matrix too."""
    logit_softcap: float | None = None
    """Squash logits to (-cap, cap) by cap * tanh(logit / cap)."""
    logit_scale: float = 1.0
    """Factor on what enters the output matrix (1 / sqrt(d_model) in the first T5)."""
    head_bias: bool = False
    """The output matrix has a bias."""
    head_transform: bool = False
    """Dense layer, activation and norm before the output matrix, as in BERT."""
    transform_bias: bool = True
    """That dense layer has a bias."""
    pooling: Pooling = Pooling.last
    """Which state of a sequence a verdict is read from: the `first`, the `last` or the `mean` of the real tokens."""
    pooler: Pooler = Pooler.none
    """What stands between: nothing, a dense layer and `tanh` (BERT), or the `transform` of `head_transform` (ModernBERT)."""
    num_labels: int = 2
    """Outputs of a classification head."""
    dropout: float = 0.0
    """Probability of zeroing each element of what attention and feed-forward add to the residual stream."""
    init_std: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get
    init_std / sqrt(2 n_layers)."""


def layer_type(options: TransformerOptions, layer: int) -> LayerType:
    """Return how far block `layer` looks."""
    return LayerType(options.layer_types[layer % len(options.layer_types)])


def window_of(options: TransformerOptions, layer: int) -> int | None:
    """Return the window of block `layer`; None = it sees everything."""
    return options.window if layer_type(options, layer) == LayerType.window else None


def has_experts(options: TransformerOptions, layer: int) -> bool:
    """Return whether block `layer` has experts instead of one feed-forward layer."""
    return options.num_experts > 0 and layer not in options.dense_layers


def d_rotary(options: TransformerOptions) -> int:
    """Return how many channels of a head are rotated."""
    return int(resolve_d_head(options) * options.rope_fraction)


def resolve_d_head(options: TransformerOptions) -> int:
    """Return the width of one head.

    Raises:
        ConfigError: the heads do not fit the model, in numbers.
    """
    if options.n_heads % options.n_kv_heads:
        raise ConfigError(
            f"arch.n_heads={options.n_heads} is not a multiple of arch.n_kv_heads={options.n_kv_heads}. "
            f"Set arch.n_kv_heads to a divisor of {options.n_heads}."
        )
    if options.d_head is None and options.d_model % options.n_heads:
        raise ConfigError(
            f"arch.d_model={options.d_model} is not a multiple of arch.n_heads={options.n_heads}. "
            f"Set arch.d_model={options.d_model // options.n_heads * options.n_heads} or give arch.d_head."
        )
    d_head = options.d_head or options.d_model // options.n_heads
    if options.position == Position.rotary and int(d_head * options.rope_fraction) % 2:
        raise ConfigError(
            f"arch.d_head={d_head} x arch.rope_fraction={options.rope_fraction} is odd, but rotary positions turn "
            f"pairs of channels. Set arch.d_head={d_head + 1}."
        )
    return d_head


def attention_need(
    options: Any, device: torch.device, dtype: torch.dtype, trains: bool
) -> Need | None:
    """Return what a model asks of its attention kernel; None = it has no attention of ours."""
    if not isinstance(options, TransformerOptions) or options.name == "auto":
        return None
    return Need(
        device=device,
        dtype=dtype,
        d_head=resolve_d_head(options),
        trains=trains,
        bias=options.position == Position.relative,
        softcap=options.attention_softcap is not None,
        sinks=options.attention_sinks,
    )


def check_switches(options: TransformerOptions) -> None:
    """Refuse combinations of switches that have no meaning.

    Raises:
        ConfigError: all problems, in numbers.
    """
    problems = []
    known = [str(t) for t in LayerType]
    wrong = sorted({str(t) for t in options.layer_types} - set(known))
    if wrong or not options.layer_types:
        problems.append(
            f"arch.layer_types={list(options.layer_types)} must list {' or '.join(known)} for each block."
        )
    elif LayerType.window in options.layer_types and options.window is None:
        problems.append(
            "arch.layer_types has blocks of type window, but arch.window is not set. Set arch.window=N tokens."
        )
    if options.window is not None and options.window < 1:
        problems.append(f"arch.window={options.window} must be at least 1. Set 128.")
    if options.num_experts and not 1 <= options.experts_per_token <= options.num_experts:
        problems.append(
            f"arch.experts_per_token={options.experts_per_token} must be from 1 to arch.num_experts="
            f"{options.num_experts}. Set {min(2, options.num_experts)}."
        )
    if options.rope_sign not in (1, -1):
        problems.append(f"arch.rope_sign={options.rope_sign} must be 1 or -1. Set 1.")
    if not 0 < options.rope_fraction <= 1:
        problems.append(
            f"arch.rope_fraction={options.rope_fraction} must be above 0 and at most 1. Set 1.0."
        )
    for name in ("attention_softcap", "logit_softcap"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            problems.append(f"arch.{name}={value} must be above 0. Set null to turn it off.")
    if problems:
        raise ConfigError(" ".join(problems))
