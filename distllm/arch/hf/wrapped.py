"""Models of transformers as they are, for `arch/auto.py`: which class reads a directory, and where its output matrix is."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distllm.errors import CheckpointError

HEAD_FILE = "distllm_head.safetensors"
"""Holds a head that transformers does not have."""
KINDS = ("causal", "masked", "seq2seq")
_TOLERANCE = 1e-3


def read_config(folder: Path) -> Any:
    """Read the configuration in a directory.

    Raises:
        CheckpointError: transformers does not know the model, or it would have to run code of the directory.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers cannot read {folder}/config.json: {first}") from error


def kind_of(config: Any) -> str:
    """Return which of `KINDS` a configuration is of.

    Raises:
        CheckpointError: it is of none.
    """
    fitting = {
        kind
        for kind, auto in zip(KINDS, _autos(), strict=True)
        if type(config) in auto._model_mapping
    }
    if config.is_encoder_decoder and "seq2seq" in fitting:
        return "seq2seq"
    named = (config.architectures or [""])[0]
    for kind, ending in (("masked", "MaskedLM"), ("causal", "CausalLM")):
        if kind in fitting and named.endswith(ending):
            return kind
    # BERT and the like have a causal class too, for who asks for it.
    for kind in ("masked", "causal"):
        if kind in fitting:
            return kind
    raise CheckpointError(
        f"transformers has no causal, masked or sequence-to-sequence language model for model_type="
        f"{config.model_type}, so arch=auto cannot run it."
    )


def empty(config: Any) -> Any:
    """Build the language model of a configuration with whatever values it starts with."""
    return _auto_of(config).from_config(config, attn_implementation="eager")


def load(folder: Path, config: Any, dtype: torch.dtype | None) -> Any:
    """Load the language model in a directory.

    Raises:
        CheckpointError: files are missing or damaged.
    """
    try:
        return _auto_of(config).from_pretrained(
            folder,
            config=config,
            dtype="auto" if dtype is None else dtype,
            attn_implementation="eager",  # the one that every class has, and that takes any mask
            local_files_only=True,
            use_safetensors=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise CheckpointError(f"transformers cannot load {folder}: {first}") from error


def save(
    model: Any, state: Mapping[str, Tensor], entries: Mapping[str, Any], head_state: Mapping[str, Tensor], folder: Path
) -> None:  # fmt: skip
    """Write the model as transformers does, with `entries` of ours in config.json, and a head of ours beside it."""
    from safetensors.torch import save_file

    model.save_pretrained(folder, state_dict=dict(state))
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | dict(entries)
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if head_state:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in head_state.items()}
        save_file(plain, folder / HEAD_FILE)


def saved_head(folder: Path) -> str:
    """Return the head that a wrapped model was saved with."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("distllm_head", "lm") if config.get("distllm_arch") == "auto" else "lm"


def load_head(head: nn.Module, folder: Path) -> None:
    """Read the parameters of a head of ours, if there are any."""
    from safetensors.torch import load_file

    if (folder / HEAD_FILE).is_file():
        state = load_file(folder / HEAD_FILE)
        head.load_state_dict({n.removeprefix("head."): t for n, t in state.items()})


def encoder_outputs(states: Tensor) -> Any:
    """Wrap encoder states the way transformers' models hand them on."""
    from transformers.modeling_outputs import BaseModelOutput

    return BaseModelOutput(last_hidden_state=states)  # type: ignore[arg-type]


class WrappedCache:
    """transformers' key/value cache, which grows by a column per token; of a decoder that reads an encoder, its states too."""

    def __init__(self, batch_size: int, max_seq_len: int, cross: bool) -> None:
        from transformers import DynamicCache, EncoderDecoderCache

        own = DynamicCache()
        self.inner: Any = EncoderDecoderCache(own, DynamicCache()) if cross else own
        self._own = own
        self.batch_size, self.max_seq_len, self.length = batch_size, max_seq_len, 0
        self.encoder_states: Tensor | None = None
        self.encoder_mask: Tensor | None = None

    def select(self, rows: Tensor) -> WrappedCache:
        """Keep the rows `rows` [num_rows] int64, in that order."""
        self.inner.batch_select_indices(rows)
        self._map(lambda x: x.index_select(0, rows))
        self.batch_size = len(rows)
        return self

    def repeat(self, num: int) -> WrappedCache:
        """Repeat every row `num` times, copies next to each other."""
        self.inner.batch_repeat_interleave(num)
        self._map(lambda x: x.repeat_interleave(num, dim=0))
        self.batch_size *= num
        return self

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.encoder_states is not None:
            self.encoder_states = change(self.encoder_states)
        if self.encoder_mask is not None:
            self.encoder_mask = change(self.encoder_mask)

    def drop_columns(self, num: int) -> None:
        """Drop the first `num` columns: padding in all rows."""
        layers: list[Any] = self._own.layers
        for layer in layers:
            layer.keys, layer.values = layer.keys[..., num:, :], layer.values[..., num:, :]
        self.length -= num


@contextmanager
def before_output_matrix(model: Any) -> Iterator[list[Tensor]]:
    """Collect what enters the output matrix during the `with`."""
    seen: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0])
    )
    try:
        yield seen
    finally:
        hook.remove()


def softcap_of(config: Any) -> float | None:
    """Return the soft-cap on the logits that a configuration names."""
    return getattr(config, "final_logit_softcapping", None)


def shift_of(model: Any) -> Tensor | None:
    """Return what BART and its kin add to the logits: [1, vocab]."""
    return getattr(model, "final_logits_bias", None)


def shifted(logits: Tensor, shift: Tensor | None) -> Tensor:
    """Add `shift`, if there is one."""
    return logits if shift is None else logits + shift


@torch.no_grad()
def check_head(model: Any, kind: str, folder: Path) -> bool:
    """Make sure that the logits are the output matrix applied to what enters it, and perhaps a soft-cap.

    Returns:
        True where what enters it is what the body of the model returns.

    Raises:
        CheckpointError: there is more to the logits than that.
    """
    matrix = model.get_output_embeddings()
    if matrix is None:
        raise CheckpointError(f"{folder} holds a model without an output matrix.")
    ids = torch.arange(4, 8, device=matrix.weight.device)[None] % model.config.vocab_size
    given: dict[str, Any] = {"input_ids": ids}
    if kind == "seq2seq":
        given["decoder_input_ids"] = ids
    was_training = model.training
    model.eval()
    with before_output_matrix(model) as seen:
        logits = model(**given).logits
    body = model.base_model(**given).last_hidden_state
    model.train(was_training)
    expected = shifted(matrix(seen[-1]), shift_of(model))
    cap = softcap_of(model.config)
    if cap is not None:
        expected = cap * torch.tanh(expected / cap)
    scale = logits.abs().max().clamp(min=1e-6)
    if (expected - logits).abs().max() > _TOLERANCE * scale:
        raise CheckpointError(
            f"the logits of {type(model).__name__} are not its output matrix times a hidden state, so arch=auto cannot "
            "train it without holding all of them."
        )
    return body.shape == seen[-1].shape and bool(torch.equal(body, seen[-1]))


def repeated(model: nn.Module) -> list[nn.Module]:
    """Return the blocks: the modules of the longest lists, encoder before decoder."""
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
    outer = [m for m in lists if not any(m in list(o.modules())[1:] for o in lists)]
    kinds = {}
    for found in outer:
        kinds.setdefault(len(found), []).append(found)
    if not kinds:
        return []
    return [block for found in kinds[max(kinds)] for block in found]


def _auto_of(config: Any) -> Any:
    autos: dict[str, Any] = dict(zip(KINDS, _autos(), strict=True))
    return autos[kind_of(config)]


def _autos() -> tuple[Any, Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM

    return AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
