"""Model directories in Hugging Face layout: config.json, model.safetensors, the tokenizer's files, a model card.

Which names and settings a family uses is in `arch/hf/`, one file per family; the files are read in `files.py`. Training checkpoints are not made here:
they are in `train/checkpoint.py`.
"""

from __future__ import annotations

import difflib
import json
import shutil
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from distllm import registry
from distllm.arch.files import (
    beside,
    clear_debris,
    put_in_place,
    read_config,
    read_json,
    read_tensors,
)
from distllm.arch.hf.family import Family, families, family_of
from distllm.arch.hf.rules import their_names
from distllm.errors import CheckpointError

_FRESH_HEAD = "head."
_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


def load_model(
    folder: str | Path,
    head: str | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    seed: int = 0,
    arch: str | None = None,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Read a model and its tokenizer from a directory in Hugging Face layout; nothing is fetched from a network.

    Args:
        folder: the directory.
        head: None keeps the saved head. A language model can be given another head; its new parameters are drawn
            from `seed`.
        device: where to put the model.
        dtype: of the weights; None keeps the saved one.
        seed: of parameters that are not in the directory.
        arch: "auto" runs transformers' own code, whatever the family; anything else takes what config.json says.
        changes: options that differ from the saved ones, such as the number of labels of a new head.

    Returns:
        (model in eval mode, tokenizer or None when the directory holds none).

    Raises:
        CheckpointError: files are missing or damaged, or the tensors are not those of the configuration.
    """
    folder = Path(folder)
    if _is_wrapped(read_config(folder), arch):
        from distllm.arch import auto

        wrapped, line = auto.load(folder, head, dtype, seed, changes)
        model: Any = wrapped
        config = read_config(folder)
        is_own = config.get("distllm_head") == model.head_name  # else transformers' placeholders
        model.label_names = _label_names(config, model.head_name) if is_own else []
        warnings.warn(line, UserWarning, stacklevel=2)
        return model.to(device), read_tokenizer(folder)
    model, state = open_model(folder, head, seed, changes)
    if dtype is not None:
        state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
    model.load_state_dict(state, assign=True)
    return model.to(device).eval(), read_tokenizer(folder)


def open_model(
    folder: str | Path,
    head: str | None = None,
    seed: int = 0,
    changes: Mapping[str, Any] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """Read a model's shape and, apart, its weights: for a process that will keep only a part of them.

    Args:
        folder: the directory, as for `load_model`.
        head: None keeps the saved head.
        seed: of parameters that are not in the directory.
        changes: options that differ from the saved ones.

    Returns:
        (model on the meta device, full tensors by parameter and buffer name).

    Raises:
        CheckpointError: as `load_model`.
    """
    folder = Path(folder)
    config = read_config(folder)
    family = _family(config, folder)
    tensors = read_tensors(folder)
    options, state, saved_head = family.from_hf(config, tensors, head)
    options = replace(options, **(changes or {}))
    model_class = registry.get("arch", options.name)
    wanted_head = head or saved_head
    with torch.device("meta"):
        model = model_class(options, head=wanted_head)
    _check_swap(saved_head, wanted_head, folder)
    fresh = (
        {n for n in _expected(model) if n.startswith(_FRESH_HEAD)}
        if wanted_head != saved_head
        else set()
    )
    _check_tensors(
        model, state, fresh, folder, their_names(family.rules(options, wanted_head)), tensors
    )
    _fill_fresh(model, state, seed)
    model.label_names = _label_names(config, saved_head) if wanted_head == saved_head else []
    model.generation_defaults = read_json(folder / "generation_config.json")
    return model, state


def save_model(
    model: Any,
    tokenizer: Any,
    folder: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    end_ids: Sequence[int] = (),
    card: str = "",
) -> None:
    """Write a directory that `load_model` and transformers read. It appears whole or not at all.

    What earlier, killed calls left beside `folder` is removed.

    Args:
        model: gives the shape, the head and, without `state`, the weights.
        tokenizer: written beside the weights; None writes none.
        folder: created, or replaced.
        state: full tensors by our parameter names, where the model itself holds only shards.
        end_ids: further token ids that end a response (an end-of-turn token), for generation_config.json.
        card: Markdown appended to the model card.

    Raises:
        CheckpointError: the files cannot be written; what was at `folder` is untouched.
    """
    from safetensors import SafetensorError

    options, head = model.options, model.head_name
    state = dict(model.state_dict() if state is None else state)
    is_wrapped = options.name == "auto"
    config, tensors = ({}, {}) if is_wrapped else family_of(options).to_hf(options, state, head)
    labels = _named_labels(getattr(model, "label_names", []))
    defaults = getattr(model, "generation_defaults", {})
    special = _special_ids(tokenizer, defaults)
    config = special | config | labels
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    clear_debris(folder)
    aside = beside(folder, "tmp")
    try:
        aside.mkdir()
        if is_wrapped:
            _save_wrapped(model, state, labels, aside)
        else:
            _write_model(aside, config, tensors)
        _write_texts(
            aside,
            defaults | _generation_config(special, defaults, end_ids),
            _card(model, sum(t.numel() for t in state.values()), card),
        )
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise CheckpointError(
            f"the model cannot be written to {folder}: {error}. Make room or give another directory; "
            "what was there is untouched."
        ) from error
    put_in_place(aside, folder)


def read_options(folder: Path, arch: str | None = None) -> Any:
    """Read the shape of the model in a directory, without its weights; `arch` as in `load_model`.

    Raises:
        CheckpointError: config.json is missing, damaged, or of a family we cannot read.
    """
    config = read_config(folder)
    if _is_wrapped(config, arch):
        from distllm.arch import auto

        return auto.read_options(folder)
    return _family(config, folder).from_hf(config, {})[0]


def read_tokenizer(folder: Path) -> Any:
    """Read the tokenizer beside a model; None when there is none."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for how in ("local_files_only", "is_local"):  # how it was read is nothing to write down
        tokenizer.init_kwargs.pop(how, None)
    return tokenizer


def _family(config: Mapping[str, Any], folder: Path) -> Family:
    known, model_type = families(), str(config.get("model_type"))
    if model_type not in known:
        near = difflib.get_close_matches(model_type, known, n=1, cutoff=0.5)
        hint = f" The nearest is {near[0]}." if near else ""
        raise CheckpointError(
            f"{folder}/config.json has model_type={model_type}, which is not among the families read natively: "
            f"{', '.join(sorted(known))}.{hint} arch=auto model={folder} runs any model that transformers can load."
        )
    return known[model_type]


def _expected(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.state_dict())


def _label_names(config: Mapping[str, Any], head: str) -> list[str]:
    """Read the names of a head's labels."""
    if head not in ("classify", "tag"):
        return []
    named = config.get("id2label") or {}
    return [named[str(i)] for i in range(len(named))]


def _named_labels(names: Sequence[str]) -> dict[str, Any]:
    """Write the names of a head's labels; nothing if they have none."""
    if not names:
        return {}
    return {
        "id2label": {str(i): name for i, name in enumerate(names)},
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _check_swap(saved_head: str, head: str, folder: Path) -> None:
    """Refuse to put another head on what was trained to judge: its hidden states serve that judgement."""
    if (saved_head, head) == ("classify", "value"):
        return  # the critic of a policy over labels
    if head != saved_head and saved_head not in ("lm", "likelihood", "none"):
        raise CheckpointError(
            f"{folder} holds a model with the head {saved_head}; only a language model can be given "
            f"another head ({head} was asked for)."
        )


def _check_tensors(
    model: nn.Module,
    state: Mapping[str, Tensor],
    fresh: set[str],
    folder: Path,
    theirs: Mapping[str, tuple[str, ...]],
    on_disk: Collection[str],
) -> None:
    expected = _expected(model)
    buffers = {name for name, _ in model.named_buffers()}
    absent = set(expected) - set(state) - fresh - buffers
    missing = [
        n
        for name in sorted(absent)
        for n in theirs.get(name, (name,))
        if n not in on_disk and n.partition(".")[2] not in on_disk
    ]
    extra = sorted(set(state) - set(expected))
    wrong = [
        f"{_few(theirs.get(name, (name,)), 1)} is {list(state[name].shape)}, config.json says "
        f"{list(expected[name].shape)}"
        for name in sorted(set(expected) & set(state))
        if state[name].shape != expected[name].shape
    ]
    problems = [
        *([f"{len(missing)} missing: {_few(missing)}"] if missing else []),
        *([f"{len(extra)} not part of the model: {_few(extra)}"] if extra else []),
        *([f"{len(wrong)} of the wrong shape: {_few(wrong)}"] if wrong else []),
    ]
    if problems:
        raise CheckpointError(
            f"the weights in {folder} do not fit the model. {'; '.join(problems)}."
        )


def _few(names: Sequence[str], limit: int = 6) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _fill_fresh(model: Any, state: dict[str, Tensor], seed: int) -> None:
    from distllm.layers.init import initial_value

    rules = model.init_rules()
    for name, parameter in model.named_parameters():
        if name not in state:
            state[name] = initial_value(rules, name, parameter.shape, seed)
    for name, default in (("head.reward_mean", 0.0), ("head.reward_std", 1.0)):
        if name in _expected(model):
            state.setdefault(name, torch.tensor(default))


def _special_ids(tokenizer: Any, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Read the ids of special tokens off the tokenizer; without one keep those the model came with."""
    if tokenizer is None:
        return {key: defaults.get(key) for key in _SPECIAL}
    return {key: getattr(tokenizer, key, None) for key in _SPECIAL}


def _generation_config(
    special: Mapping[str, Any], defaults: Mapping[str, Any], end_ids: Sequence[int]
) -> dict[str, Any]:
    """Write the special ids; a response ends at the tokenizer's end, at those the model came with, and at `end_ids`."""
    known: dict[str, Any] = {key: value for key, value in special.items() if value is not None}
    ends = {*_listed(known.get("eos_token_id")), *_listed(defaults.get("eos_token_id")), *end_ids}
    if len(ends) > 1 or end_ids:
        known["eos_token_id"] = sorted(ends)
    return known


def _listed(ids: int | list[int] | None) -> list[int]:
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


def _write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save_file

    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(plain, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _save_wrapped(
    model: Any, state: Mapping[str, Tensor], labels: Mapping[str, Any], folder: Path
) -> None:
    from distllm.arch import auto

    auto.save(model, state, labels, folder)


def _write_texts(folder: Path, generation_config: Mapping[str, Any], card: str) -> None:
    text = json.dumps(generation_config, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _card(model: Any, num_parameters: int, extra: str) -> str:
    options = model.options
    title = options.family or options.name
    return (
        f"# {title}, {model.head_name} head\n\nTrained with distllm. {num_parameters:,} parameters, {options.n_layers} "
        f"layers of width {options.d_model}, vocabulary {options.vocab_size:,}, context {options.max_seq_len:,} "
        f'tokens.\n\nLoad it with `distllm.load_model("DIR")`.\n{extra}'
    )


def _is_wrapped(config: Mapping[str, Any], arch: str | None) -> bool:
    return "auto" in (arch, config.get("distllm_arch"))
