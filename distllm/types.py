"""The words every folder shares. Shapes are written `[batch, seq]`; masks are True where a token takes part."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

IGNORE_INDEX = -100
"""Label of a position that has no target."""


def free(default: Any = dataclasses.MISSING, **kwargs: Any) -> Any:
    """Declare an options field that may differ when a run is resumed; all other fields must stay the same."""
    return field(default=default, metadata={"resume": "free"}, **kwargs)


@dataclass(slots=True, kw_only=True)
class Batch:
    """One micro-batch, padded to a rectangle. Absent fields are None."""

    input_ids: Tensor
    """[batch, seq] int64."""
    labels: Tensor | None = None
    """[batch, seq] int64: the id that position t must predict (already shifted), IGNORE_INDEX where there is none."""
    attention_mask: Tensor | None = None
    """[batch, seq] bool: True on real tokens, False on padding."""
    position_ids: Tensor | None = None
    """[batch, seq] int64 ([batch, 2, seq] where positions have two dimensions); None lets the model derive them."""
    segment_ids: Tensor | None = None
    """[batch, seq] int64: tokens see each other only within one segment; 0 marks padding. Marks packing."""
    token_type_ids: Tensor | None = None
    """[batch, seq] int64: 0 on the first text of a pair, 1 on the second."""
    prefix_lengths: Tensor | None = None
    """[batch] int64: the tokens at the start of each row that all its tokens see."""
    decoder_input_ids: Tensor | None = None
    """[batch, target_seq] int64: what a decoder beside an encoder reads; all per-token fields are then of that shape."""
    decoder_attention_mask: Tensor | None = None
    """[batch, target_seq] bool."""
    decoder_segment_ids: Tensor | None = None
    """[batch, target_seq] int64: a target sees the source of its own number; 0 marks padding."""
    sample_ids: Tensor | None = None
    """[samples] int64: which samples of the data set are in the batch: its rows, in order, unless several share a row."""
    classes: Tensor | None = None
    """[batch] int64: the class of each sequence."""
    rewards: Tensor | None = None
    """[responses] float: one score per response; responses are the rows unless `response_index` says otherwise."""
    total: Tensor | None = None
    """Scalar: what sums over the responses are divided by, if some were left out for want of a gradient: these included."""
    response_index: Tensor | None = None
    """[batch, seq] int64: which response a labelled position belongs to (0 where there is no label)."""
    loss_mask: Tensor | None = None
    """[batch, seq] bool: False on labelled positions that nothing is learned from (an environment's words)."""
    rollout_logprobs: Tensor | None = None
    """[batch, seq] float: log-probabilities reported by the sampler, at the positions that have a label."""
    old_logprobs: Tensor | None = None
    """[batch, seq] float: log-probabilities under the policy before this update."""
    ref_logprobs: Tensor | None = None
    """[batch, seq] float: log-probabilities under the frozen reference."""
    advantages: Tensor | None = None
    """[batch, seq] float."""
    returns: Tensor | None = None
    """[batch, seq] float: regression targets of the value model."""
    old_values: Tensor | None = None
    """[batch, seq] float: values before this update."""
    margins: Tensor | None = None
    """[pairs] float: the lead that the chosen answer should have (reward models); rows are chosen, then rejected ones."""
    confidences: Tensor | None = None
    """[pairs] float: probability that the chosen answer is better; by objectives, [pairs, objectives], NaN where not told."""
    is_good: Tensor | None = None
    """[batch] bool: whether the answer in this row is a good one."""
    ref_sums: Tensor | None = None
    """[batch] float: summed log-probability of the row's labelled tokens under the frozen reference."""
    kl_baseline: Tensor | None = None
    """Scalar: divergence from the reference over the whole global batch (KTO)."""

    def inputs(self) -> dict[str, Tensor]:
        """Return the arguments of a model's forward that this batch holds."""
        held = {name: getattr(self, name) for name in MODEL_INPUTS}
        return {name: value for name, value in held.items() if value is not None}

    @property
    def output_mask(self) -> Tensor | None:
        """The mask of the positions that `labels` and `last_hidden_state` cover."""
        return (
            self.attention_mask if self.decoder_input_ids is None else self.decoder_attention_mask
        )

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with every tensor on `device`."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{k: v.to(device) if isinstance(v, Tensor) else v for k, v in moved.items()})


MODEL_INPUTS = (
    "input_ids",
    "attention_mask",
    "position_ids",
    "segment_ids",
    "token_type_ids",
    "prefix_lengths",
    "decoder_input_ids",
    "decoder_attention_mask",
    "decoder_segment_ids",
)
"""Fields of a batch that are arguments of a model's forward."""


@dataclass(slots=True, kw_only=True)
class Rollout:
    """One sampled response with everything the update needs; per-token fields are [response]."""

    prompt_ids: list[int]
    response_ids: list[int]
    rollout_logprobs: Tensor
    """[response] float32: log-probability of each sampled token under exactly the distribution it was drawn from."""
    finish_reason: str
    """`stop` when an end token was sampled (it is the last response id), `length` when the budget ran out."""
    prompt_index: int
    """Which prompt of the data set."""
    sample_index: int = 0
    """Which of the prompt's samples."""
    loss_mask: Tensor | None = None
    """[response] bool: True on tokens the policy sampled, False on what an environment said; None means all were sampled."""
    score: float = float("nan")
    """What the reward function said."""
    reward: float = 0.0
    """What is learned from: the score, shaped as configured. NaN leaves the response out."""
    baseline: float = 0.0
    """What `reward` is compared with, where that is known beforehand (the greedy response's reward in ReMax)."""
    old_logprobs: Tensor | None = None
    ref_logprobs: Tensor | None = None
    old_values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None


@dataclass(slots=True)
class LossOutput:
    """What an objective returns for one micro-batch: sums only, never means, so that micro-batches add up."""

    losses: dict[str, Tensor]
    """Term -> sum over this micro-batch (a scalar with gradient)."""
    metrics: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Name -> (sum, weight), both detached scalars; reported as sum / weight over the whole step."""


@dataclass  # without slots: DeepSpeed looks for tensors in what a module returns, by way of vars()
class ModelOutput:
    """What a model returns. Fields that do not apply are None."""

    logits: Tensor | None = None
    """[batch, seq, vocab], or [batch, num_labels]."""
    last_hidden_state: Tensor | None = None
    """[batch, seq, d_model], after the final norm."""
    scores: Tensor | None = None
    """[batch]: a reward model's verdict, read at the last real token."""
    values: Tensor | None = None
    """[batch, seq]: a value model's estimate at each position."""
    encoder_states: Tensor | None = None
    """[batch, source_seq, d_model]."""
    aux: dict[str, Tensor] | None = None
    """Losses of the model itself, in training mode only: `balance` and `router_z` of its experts, each times its
    coefficient and summed over the rows of the batch, so that they weigh as many as there are rows."""


@dataclass(frozen=True, slots=True)
class Ranks:
    """Where this process stands. dp counts the processes that see different data, tp those that share one copy of it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    dp_rank: int = 0
    dp_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1

    @property
    def is_main(self) -> bool:
        """True on the one process that writes shared files."""
        return self.rank == 0


class Model(Protocol):
    """What engines, objectives and samplers may ask of a model. A model knows no ranks, no config framework, no logging."""

    options: Any
    """The arch options dataclass it was built from."""
    head_name: str
    """Which of `arch.heads` it has."""
    abilities: Any
    """`arch.abilities`: what it can be trained for."""
    head: Any
    """`arch.heads` module that turns hidden states into logits, log-probabilities, losses, scores or values."""

    def __call__(
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
        cache: Any = None,
        compute_logits: bool = True,
    ) -> ModelOutput: ...

    def blocks(self) -> Sequence[torch.nn.Module]:
        """Return the repeated blocks, in order (units of sharding, checkpointing and compilation)."""
        ...

    def shard_plan(self) -> Mapping[str, str]:
        """Return parameter-name pattern -> `column | row | vocab | sequence`."""
        ...

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Lay prompts and responses out as model inputs; `labels` holds the response ids where they are predicted.

        Read row by row, the labelled positions of row i are the tokens of `responses[i]` in order.
        """
        ...

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> Any:
        """Read prompts, to be continued by at most `room` tokens (`arch.reading`)."""
        ...

    def room_after(self, prompt_length: int) -> int:
        """Return how many response tokens there is room for behind a prompt."""
        ...

    def new_cache(
        self, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> Any:
        """Allocate a static key/value cache for generation."""
        ...


class Objective(Protocol):
    """What is learned from a batch. Terms are additive: loss = sum_k coef_k * (sum of loss_k) / (sum of weight_k)."""

    @property
    def coefficients(self) -> Mapping[str, float]:
        """Term -> coefficient."""
        ...

    def collate(self, examples: Sequence[Any]) -> Batch:
        """Pad `examples` to one rectangle."""
        ...

    def weights(self, batch: Batch) -> dict[str, Tensor]:
        """Term -> how much this batch weighs (target tokens, pairs, sequences), as scalars."""
        ...

    def loss(self, model: Model, batch: Batch) -> LossOutput:
        """Run the model and return loss sums per term."""
        ...


def _place() -> Any:
    """Declare where a record was read; two records with equal content are equal all the same."""
    return field(default="", compare=False, repr=False)


@dataclass(slots=True, kw_only=True)
class Document:
    """A text to pretrain on."""

    text: str
    name: str = ""
    place: str = _place()
    """Where it was read: file and line. Not part of the content."""


@dataclass(slots=True, kw_only=True)
class Dialogue:
    """A conversation to imitate; `messages` are `{"role": ..., "content": ...}`, the last one is the assistant's."""

    messages: list[dict[str, str]]
    learned: list[int] | None = None
    """Which of the assistant's messages are learned from, by index; None means all of them."""
    task: str = ""
    is_text: bool = field(default=False, compare=False, repr=False)  # as in Prompt
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class Pair:
    """Two answers to one prompt, the first preferred."""

    prompt: list[dict[str, str]]
    chosen: str
    rejected: str
    margin: float = 0.0
    """By how much the chosen answer's score should lead."""
    confidence: float = 1.0
    """Probability that the chosen answer is the better one: 1 for a hard label, 0.5 for a toss-up."""
    kind: str = ""
    """Where the rejected answer comes from: `corrupted`, `sampled`, or empty when unknown."""
    task: str = ""
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class ComparedPair(Pair):
    """Two answers compared by several objectives: name -> probability that the chosen one is better, where told."""

    objectives: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Prompt:
    """Something to answer, with what a rule needs to judge the answer."""

    messages: list[dict[str, str]]
    answer: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    """Further columns of the row, for a reward function."""
    task: str = ""
    is_text: bool = field(default=False, compare=False, repr=False)
    """The row's prompt was a text, not messages: reward functions in TRL's form then get texts."""
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class Unpaired:
    """One answer to a prompt and whether it is a good one."""

    prompt: list[dict[str, str]]
    completion: str
    good: bool
    task: str = ""
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class Labelled:
    """One text, or two that belong together, and the class or number to predict."""

    texts: list[str]
    label: str | int | float
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class Tagged:
    """The words of a sentence with a tag each."""

    tokens: list[str]
    tags: list[str]
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class Stepwise:
    """A solution in steps, each judged right or wrong."""

    prompt: list[dict[str, str]]
    steps: list[str]
    right: list[bool]
    place: str = _place()


@dataclass(slots=True, kw_only=True)
class Parallel:
    """A text and what it is to be turned into (translation, summary, a command's actions)."""

    source: str
    target: str
    place: str = _place()


Record = Document | Dialogue | Pair | Prompt | Unpaired | Labelled | Tagged | Stepwise | Parallel


def sum_by_key(parts: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Add up mappings of scalars key by key."""
    total: dict[str, Tensor] = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total[key] + value if key in total else value
    return total
