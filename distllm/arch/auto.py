"""Any language model that transformers can load, behind our model protocol: causal, masked or sequence to sequence.

It runs transformers' own code with its plain attention: reference speed. Families that have a file in `hf/` run on our
block instead; choose this with arch=auto. What it asks of transformers is in `hf/wrapped.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distllm.arch.abilities import CAUSAL, Abilities
from distllm.arch.heads import HEADS
from distllm.arch.hf import wrapped
from distllm.arch.joining import join_behind, pad_right
from distllm.arch.options import TransformerOptions
from distllm.arch.reading import CrossReading, Reading
from distllm.arch.stack import dtype_of
from distllm.arch.wrapped_heads import WrappedLikelihoodHead, WrappedLMHead
from distllm.errors import ConfigError
from distllm.layers.init import InitRules, initial_value
from distllm.layers.masks import lay_out
from distllm.registry import register, unknown_name
from distllm.types import IGNORE_INDEX, Batch, ModelOutput

UNBOUNDED = 1 << 20
"""Longest sequence of a model that names no limit, in tokens."""


@dataclass(kw_only=True, slots=True)
class AutoOptions(TransformerOptions):
    """What a wrapped model is; filled in from its config.json. Settings of arch= do not change it."""

    name: str = "auto"
    """Registry key of the architecture."""
    path: str = ""
    """Directory of the model; model=DIR sets it."""
    kind: str = ""
    """`causal`, `masked` or `seq2seq`."""
    decoder_start_id: int = 0
    """Token that a sequence-to-sequence model's decoder starts with."""


def read_options(folder: Path) -> AutoOptions:
    """Read what can be said of a model without loading it.

    Raises:
        CheckpointError: transformers does not know it.
    """
    config = wrapped.read_config(folder)
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", 1)
    longest = getattr(text, "max_position_embeddings", None) or UNBOUNDED
    return AutoOptions(
        path=str(folder),
        kind=wrapped.kind_of(config),
        vocab_size=text.vocab_size,
        d_model=text.hidden_size,
        n_layers=text.num_hidden_layers,
        n_heads=heads,
        n_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        max_seq_len=longest if longest > 0 else UNBOUNDED,
        decoder_start_id=getattr(config, "decoder_start_token_id", None) or 0,
        tie_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
        num_labels=config.num_labels,
    )


@register("arch")
class Auto(nn.Module):
    """A model of transformers. Its forward takes the keyword arguments every architecture takes."""

    Options = AutoOptions
    abilities = CAUSAL
    abilities_by_kind: Mapping[str, Abilities] = {
        "causal": CAUSAL,
        "masked": Abilities(objectives=("mlm",), sft="", generates=False),
        "seq2seq": Abilities(objectives=("span",), sft="seq2seq", two_sequences=True),
    }

    def __init__(
        self, options: AutoOptions, head: str = "lm", seed: int = 0, inner: Any = None
    ) -> None:
        """Wrap a model.

        Args:
            options: from `read_options`.
            head: as for the architectures of our own.
            seed: of a head's initial values.
            inner: the model of transformers; None builds one of the right shape, whose values mean nothing.

        Raises:
            ConfigError: no directory was given, or the head is unknown.
        """
        super().__init__()
        if not options.path:
            raise ConfigError(
                "arch=auto runs a model that exists; it needs model=HF_DIR, a directory that transformers can load."
            )
        if head not in HEADS:
            raise ConfigError(unknown_name("head", head, HEADS))
        self.options, self.head_name = options, head
        self.abilities = self.abilities_by_kind[options.kind]
        folder = Path(options.path)
        if inner is None:
            inner = wrapped.empty(wrapped.read_config(folder))
            self.is_direct = True
        else:
            self.is_direct = wrapped.check_head(inner, options.kind, folder)
        self.inner = inner
        if head == "lm":
            self.head: Any = WrappedLMHead(inner)
        elif head == "likelihood":
            self.head = WrappedLikelihoodHead(inner)
        else:
            self.head = HEADS[head](options, None)
            if not inner.get_input_embeddings().weight.is_meta:
                rules = self.init_rules()
                with torch.no_grad():
                    for name, parameter in self.head.named_parameters(prefix="head"):
                        parameter.copy_(initial_value(rules, name, parameter.shape, seed))

    @property
    def embed(self) -> nn.Embedding:
        """The token embedding."""
        return self.inner.get_input_embeddings()

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
        cache: Any = None,
        compute_logits: bool = True,
    ) -> ModelOutput:
        """Run the model.

        Args:
            input_ids: [batch, seq] int64.
            attention_mask: [batch, seq], or [batch, cache.length + seq] with a cache; True on real tokens.
            position_ids: [1 or batch, seq]; None counts the real tokens of a causal model, and leaves others to count.
            segment_ids: [batch, seq] int64 of packed rows, for models whose blocks take a mask per pair of tokens.
            token_type_ids: [batch, seq], where the model has token types.
            prefix_lengths: must be None, as must what does not fit the kind of model.
            inputs_embeds: [batch, seq, d_model] in place of `input_ids`.
            decoder_input_ids: [batch, target_seq], for sequence to sequence.
            decoder_attention_mask: [batch, target_seq], True on real tokens.
            decoder_position_ids: must be None.
            decoder_segment_ids: must be None: targets cannot be packed.
            encoder_states: [batch, seq, d_model], what an earlier call returned, in place of the source.
            cache: from `new_cache`.
            compute_logits: False stops at `last_hidden_state` and leaves the head to the caller.

        Raises:
            ValueError: an argument cannot be used by the model, or shapes do not fit.
        """
        given: dict[str, Any] = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "token_type_ids": token_type_ids,
            "decoder_input_ids": decoder_input_ids,
            "decoder_attention_mask": decoder_attention_mask,
        }
        unusable = {
            "prefix_lengths": prefix_lengths,
            "decoder_position_ids": decoder_position_ids,
            "decoder_segment_ids": decoder_segment_ids,
        }
        if self.options.kind == "seq2seq":
            unusable |= {"segment_ids": segment_ids, "position_ids": position_ids}
        else:
            unusable |= {k: given.pop(k) for k in ("decoder_input_ids", "decoder_attention_mask")}
            unusable["encoder_states"] = encoder_states
        wrong = [name for name, value in unusable.items() if value is not None]
        if wrong:
            raise ValueError(
                f"a wrapped {self.options.kind} model cannot use {', '.join(wrong)}; leave it out"
            )
        tokens = next(
            (x for x in (input_ids, inputs_embeds, decoder_input_ids) if x is not None), None
        )
        if tokens is None:
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        self._check_length(tokens.shape[1] + (0 if cache is None else cache.length))
        if segment_ids is not None:
            given |= self._packed(segment_ids, attention_mask, tokens)
        elif self.options.kind == "causal" and position_ids is None:
            given["position_ids"] = _count(attention_mask, tokens, cache)
        if cache is not None and cache.encoder_states is not None:
            encoder_states, given["attention_mask"] = cache.encoder_states, cache.encoder_mask
        if encoder_states is not None:
            given["encoder_outputs"] = wrapped.encoder_outputs(encoder_states)
            given["input_ids"] = None
        return self._run(given, attention_mask, cache, compute_logits, segment_ids is not None)

    def _run(
        self,
        given: dict[str, Any],
        attention_mask: Tensor | None,
        cache: Any,
        compute_logits: bool,
        is_packed: bool,
    ) -> ModelOutput:
        given = {k: v for k, v in given.items() if v is not None}
        if cache is not None:
            given |= {"past_key_values": cache.inner, "use_cache": True}
        else:
            given["use_cache"] = False
        if self.options.kind == "masked":
            del given["use_cache"]
        if self.is_direct or self.head_name not in ("lm", "likelihood"):
            out = self.inner.base_model(**given)
            hidden = out.last_hidden_state
        else:
            with wrapped.before_output_matrix(self.inner) as seen:
                out = self.inner(**given)
            hidden = seen[-1]
        if cache is not None:
            cache.length += hidden.shape[1]
            if self.options.kind == "seq2seq" and cache.encoder_states is None:
                cache.encoder_states = out.encoder_last_hidden_state
                cache.encoder_mask = given.get("attention_mask")
        output = ModelOutput()
        if compute_logits:
            if is_packed and self.head_name in ("last", "classify"):
                raise ValueError(
                    "a verdict per row needs one sequence per row; segment_ids mark packing"
                )
            mask = given.get("decoder_attention_mask", attention_mask)
            output = self.head(hidden, None if mask is None else mask[:, -hidden.shape[1] :])
        output.last_hidden_state = hidden
        output.encoder_states = getattr(out, "encoder_last_hidden_state", None)
        return output

    def _check_length(self, length: int) -> None:
        if length > self.options.max_seq_len:
            raise ValueError(
                f"the sequence has {length} tokens, but the model was built for at most "
                f"max_seq_len={self.options.max_seq_len}"
            )

    def _packed(
        self, segment_ids: Tensor, attention_mask: Tensor | None, tokens: Tensor
    ) -> dict[str, Any]:
        """Write packing out as a mask per pair of tokens, which plain attention adds to its scores."""
        text = self.inner.config.get_text_config()
        window = getattr(text, "sliding_window", None)
        if window is not None and getattr(text, "use_sliding_window", True):
            raise ValueError(
                f"rows are packed, but {type(self.inner).__name__} has a sliding window, which a mask of our own would "
                "replace: a wrapped model with a window takes one document per row"
            )
        layout = lay_out(
            (segment_ids.shape[0], segment_ids.shape[1]),
            causal=self.options.kind == "causal",
            attention_mask=attention_mask,
            position_ids=None,
            segment_ids=segment_ids,
            past=0,
            dtype=dtype_of(self.embed),
            device=tokens.device,
        )
        return {
            "attention_mask": layout.masks[None].bias,
            "position_ids": layout.position_ids,
        }

    def blocks(self) -> Sequence[nn.Module]:
        """Return the repeated blocks, in order."""
        return wrapped.repeated(self.inner)

    def shard_plan(self) -> Mapping[str, str]:
        """Return nothing: how a foreign model may be split is not known."""
        return {}

    def init_rules(self) -> InitRules:
        """Return parameter-name pattern -> how a parameter starts; only a head's parameters are ever drawn."""
        own = HEADS[self.head_name].init_rules(self.options.d_model, self.options.init_std)
        return {**own, "*.bias": ("constant", 0.0), "*": ("normal", self.options.init_std)}

    def join(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int
    ) -> Batch:
        """Lay prompts and responses out as the kind of model reads them: one sequence, or source and target."""
        if self.options.kind != "seq2seq":
            batch = join_behind(prompts, responses, pad_id)
            if self.options.kind == "masked" and batch.labels is not None:
                batch.labels = torch.full_like(batch.labels, IGNORE_INDEX)
            return batch
        input_ids, attention_mask = pad_right(prompts, pad_id)
        targets = [[self.options.decoder_start_id, *r] for r in responses]
        decoder_input_ids, decoder_mask = pad_right(targets, pad_id)
        labels, _ = pad_right([[*r, IGNORE_INDEX] for r in responses], IGNORE_INDEX)
        return Batch(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_mask,
            labels=labels,
        )

    def new_cache(
        self, batch_size: int, max_seq_len: int, dtype: torch.dtype, device: torch.device | str
    ) -> wrapped.WrappedCache:
        """Make transformers' growing cache answer as ours does.

        Raises:
            ConfigError: the model does not generate.
        """
        if self.options.kind == "masked":
            raise ConfigError(
                f"{self.options.path} holds a masked language model, which generates no text. Choose a causal or "
                "sequence-to-sequence one, or stage=classify, tag or reward for this one."
            )
        return wrapped.WrappedCache(batch_size, max_seq_len, self.options.kind == "seq2seq")

    def read(
        self, prompts: Sequence[Sequence[int]], room: int, pad_id: int, dtype: torch.dtype
    ) -> Any:
        """Read prompts, ready to be continued by `room` tokens; `pad_id` fills the rectangle."""
        reading = CrossReading if self.options.kind == "seq2seq" else Reading
        return reading(self, prompts, room, pad_id, dtype)

    def room_after(self, prompt_length: int) -> int:
        """Return how many response tokens there is room for behind a prompt."""
        used = 1 if self.options.kind == "seq2seq" else prompt_length
        return self.options.max_seq_len - used


def load(
    folder: Path,
    head: str | None,
    dtype: torch.dtype | None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Auto, str]:
    """Load and wrap the model in `folder`, with the head it was saved with unless `head` says another.

    `changes` are options that differ from the saved ones.

    Returns:
        (model in eval mode, a line that announces it).
    """
    options = replace(read_options(folder), **(changes or {}))
    inner = wrapped.load(folder, wrapped.read_config(folder), dtype)
    saved = wrapped.saved_head(folder)
    model = Auto(options, head or saved, seed, inner)
    if saved == model.head_name:
        wrapped.load_head(model.head, folder)
    line = (
        f"arch=auto: {type(inner).__name__} of transformers, wrapped, with plain attention: reference speed. Families "
        "that are read natively are faster."
    )
    return model.eval(), line


def save(model: Auto, state: Mapping[str, Tensor], labels: Mapping[str, Any], folder: Path) -> None:
    """Let transformers write the wrapped model, and beside it what tells us to wrap it again, and `labels`."""
    inner = {n.removeprefix("inner."): t for n, t in state.items() if n.startswith("inner.")}
    head = {n: t for n, t in state.items() if n.startswith("head.")}
    entries = {"distllm_arch": "auto", "distllm_head": model.head_name, **labels}
    wrapped.save(model.inner, inner, entries, head, folder)


def _count(attention_mask: Tensor | None, tokens: Tensor, cache: Any) -> Tensor:
    past = 0 if cache is None else cache.length
    if attention_mask is None:
        return torch.arange(past, past + tokens.shape[1], device=tokens.device)[None]
    return (F.relu(attention_mask.long().cumsum(dim=1) - 1))[:, past:]
