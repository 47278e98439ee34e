"""From a config to the parts of a stage: tokenizer, models, engines, data, objective, and what is measured.

What the parts do together is in `stage.py`; the loop is `train/loop.py`.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from distllm import registry
from distllm.arch.adapter import attach
from distllm.arch.io import load_model, open_model, read_options
from distllm.config.checks import batch_sizes
from distllm.config.schema import Config
from distllm.data.chat import end_ids
from distllm.data.source import Source as DataSource
from distllm.data.source import open_source
from distllm.data.templates import set_chat_template
from distllm.data.tokenizer import (
    check_fits,
    load_tokenizer,
    save_tokenizer,
    tokenizer_fingerprint,
    train_tokenizer,
)
from distllm.engines import collectives
from distllm.engines.base import Engine, build_engine, resolve
from distllm.engines.collectives import on_main, together
from distllm.errors import ConfigError
from distllm.layers.init import initial_weights
from distllm.pipeline.fitting import fit_options, set_dropout, special_tokens
from distllm.tracking.base import Tracker
from distllm.train.work import Source

_log = logging.getLogger("distllm")


@dataclass(slots=True, kw_only=True)
class Parts:
    """What `stage.py` needs to run a stage."""

    tokenizer: Any
    data: DataSource
    engines: Mapping[str, Engine]
    """Every engine by role."""
    trained: list[str]
    """Roles whose engines are saved in checkpoints; the first one's model is exported."""
    source: Source
    evaluate: Callable[[], tuple[dict[str, float], list[dict[str, Any]]]]
    """Measure held-out data: metrics, and sample records. All ranks call it, and all get the same."""
    baselines: Callable[[], dict[str, float]] = dict
    """Measure once, before training, what the stage has to beat: `baseline/...`. All ranks call it."""
    connect: Callable[[Tracker, Callable[[], bool]], None] = lambda *_: None
    """Called once before training with where samples go and whether a stop was requested."""
    close: Callable[[], None] = lambda: None
    """Called at the very end, however the stage ended."""
    finish: Callable[[], None] = lambda: None
    """Called once after training, before the final evaluation and export."""
    parents: dict[str, str] = field(default_factory=dict)
    """Role -> directory of the model it started from."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Further entries of `result.json`."""


@dataclass(slots=True)
class Builder:
    """Shared steps of building any stage."""

    config: Config
    run_dir: Path
    data: DataSource = field(init=False)
    tokenizer: Any = field(init=False)
    labels: list[str] = field(default_factory=list)
    """What a policy that does not write answers with; empty for those that do."""

    def __post_init__(self) -> None:
        self.data = together(lambda: open_source(self.config.data, self.config.run.seed))
        together(lambda: self.data.verify(collectives.rank(), collectives.world_size()))
        self.tokenizer = self._tokenizer()
        if self.config.data.chat_template:
            set_chat_template(self.tokenizer, self.config.data.chat_template)

    @property
    def pad_id(self) -> int:
        """Fills rectangles; masked everywhere."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def end_ids(self) -> list[int]:
        """Ids that end a response."""
        return end_ids(self.tokenizer)

    def encode(self, text: str) -> list[int]:
        """Turn plain text into ids; typed special tokens stay text."""
        plain = {"add_special_tokens": False, "split_special_tokens": True}
        return self.tokenizer(text, **plain)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """Turn response ids into text without special tokens, or a label's number into its name."""
        if self.labels:
            return self.labels[ids[0]]
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def model(self, head: str, dropout: bool = True, **changes: Any) -> Any:
        """Load `config.model`, or draw a new one, and check that all fits together; `changes` are options of the head."""
        config = self.config
        if config.model:
            model = self.load(config.model, head, **changes)
        else:
            arch = registry.get("arch", config.arch.name)
            options = replace(fit_options(config.arch, self.tokenizer), **changes)
            with torch.device("meta") if self._builds_on_meta else nullcontext():
                model = arch(options, head=head, seed=config.run.seed)
            if self._builds_on_meta:
                model.initial_weights = initial_weights(model, config.run.seed)
        self.check_fits(model)
        set_dropout(model, config.arch.dropout if dropout else 0.0, keep_others=dropout)
        return model

    def load(self, folder: str, head: str | None = None, **changes: Any) -> Any:
        """Load a model from a directory, in the way the engine takes it."""
        arch = self.config.arch.name
        if not self._builds_on_meta:
            return load_model(
                folder, head=head, seed=self.config.run.seed, arch=arch, changes=changes
            )[0]
        if read_options(Path(folder), arch).name == "auto":
            able = [
                n for n in registry.names("engine") if not registry.get("engine", n).builds_on_meta
            ]
            raise ConfigError(
                f"arch=auto wraps a model that is whole in memory, and engine={self.config.engine.name} takes it in "
                f"parts. Set engine to one of {', '.join(able)}."
            )
        model, state = open_model(folder, head, self.config.run.seed, changes)
        model.initial_weights = state.pop
        return model

    @property
    def peak_lr(self) -> float:
        """Peak learning rate of the model that the stage is about."""
        adapter = self.config.adapter
        return (adapter.name != "none" and adapter.lr) or self.config.optim.lr

    @property
    def _builds_on_meta(self) -> bool:
        return resolve(self.config.engine)[0].builds_on_meta

    def check_fits(self, model: Any) -> None:
        """Refuse a model that is too small for the tokenizer's ids or for `train.seq_len`."""
        check_fits(self.tokenizer, model.options.vocab_size)
        wanted, limit = self.config.train.seq_len, model.options.max_seq_len
        if wanted > limit:
            raise ConfigError(
                f"train.seq_len={wanted} is longer than the model's max_seq_len={limit}. "
                f"Set train.seq_len={limit} or less."
            )

    def engine(self, role: str, model: Any, *, trained: bool, lr: float = 0.0) -> Engine:
        """Put `model`, if it is trained with the adapter that is asked for, under the configured engine."""
        optim = replace(self.config.optim, lr=lr or self.peak_lr) if trained else None
        if trained and self.config.adapter.name != "none":
            attach(model, self.config.adapter, self.config.run.seed)
        return build_engine(
            role,
            model,
            options=self.config.engine,
            hardware=self.config.hardware,
            precision=self.config.train.precision,
            optim=optim,
            batch=batch_sizes(self.config),
        )

    def schedule(self) -> Any:
        """Build the learning-rate schedule."""
        options = self.config.schedule
        return registry.get("schedule", options.name)(options, self.config.train.max_steps)

    def _tokenizer(self) -> Any:
        """Take the named tokenizer, else the model's, else one trained on the data and kept in the run."""
        config = self.config
        own = self.run_dir / "tokenizer"
        if config.tokenizer:
            tokenizer = load_tokenizer(config.tokenizer)
            self._check_same_tokenizer(tokenizer)
            return tokenizer
        if config.model:
            return load_tokenizer(config.model)
        if self.data.tokenizer_dir:
            return load_tokenizer(self.data.tokenizer_dir)
        on_main(lambda: None if own.exists() else self._train_tokenizer(own))
        return load_tokenizer(own)

    def _train_tokenizer(self, folder: Path) -> None:
        config, texts, name = self.config, self.data.texts(), self.config.data.name
        if texts is None:
            name = "stdlib"
            texts = open_source(replace(config.data, name=name), config.run.seed).texts()
            assert texts is not None
        _log.info("Training a tokenizer of %d on data=%s.", config.arch.vocab_size, name)
        aside = self.run_dir / ".tokenizer.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        tokenizer = train_tokenizer(
            texts, config.arch.vocab_size, special_tokens(config), config.data.units
        )
        save_tokenizer(tokenizer, aside)
        aside.rename(folder)

    def _check_same_tokenizer(self, tokenizer: Any) -> None:
        """Refuse a tokenizer other than the one the model was trained with."""
        config = self.config
        if not config.model or not (Path(config.model) / "tokenizer.json").exists():
            return
        trained_with = load_tokenizer(config.model)
        if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(trained_with):
            raise ConfigError(
                f"tokenizer={config.tokenizer} ({len(tokenizer)} ids) differs from the tokenizer that "
                f"model={config.model} was trained with ({len(trained_with)} ids). Leave tokenizer out to use "
                "the model's own."
            )
