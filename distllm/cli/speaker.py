"""What `generate` and `chat` share: from arguments to a model that answers, with its tokenizer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distllm.cli.arguments import Arguments

SHORT = {
    "max_new_tokens": "generation.max_new_tokens",
    "temperature": "generation.temperature",
    "top_k": "generation.top_k",
    "top_p": "generation.top_p",
    "min_p": "generation.min_p",
    "repetition_penalty": "generation.repetition_penalty",
    "seed": "run.seed",
}
"""Short keys of both verbs -> the settings they stand for."""

OWN = {
    "max_new_tokens": "most tokens of a response (generation.max_new_tokens)",
    "temperature": "0 takes the likeliest token; higher varies more (generation.temperature)",
    "top_k": "draw among the k likeliest tokens; 0 is off (generation.top_k)",
    "top_p": "draw among the likeliest tokens with this probability; 1 is off (generation.top_p)",
    "min_p": "draw among tokens at least this times as likely as the likeliest; 0 is off (generation.min_p)",
    "repetition_penalty": "above 1 makes tokens less likely that are there already (generation.repetition_penalty)",
    "seed": "equal seeds give equal responses (run.seed)",
}


@dataclass(slots=True)
class Speaker:
    """A loaded model, its tokenizer, and how to draw from it."""

    engine: Any
    tokenizer: Any
    options: Any
    """GenerationOptions."""
    seed: int
    end_ids: list[int]
    pad_id: int

    @property
    def max_seq_len(self) -> int:
        """Tokens the model can read, prompt and response together."""
        return self.engine.model.options.max_seq_len

    def decode(self, ids: list[int]) -> str:
        """Turn token ids into text without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def generate(self, prompt_ids: list[int], num_samples: int) -> list[Any]:
        """Return `num_samples` rollouts."""
        from distllm.generation.generate import generate

        with self.engine.sampling() as model:
            return generate(
                model,
                [prompt_ids],
                self.options,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                seed=self.seed,
                num_samples=num_samples,
                decode=self.decode,
            )

    def stream(self, prompt_ids: list[int], turn: int) -> Iterator[int]:
        """Yield the tokens of one response; each turn has its own noise."""
        from distllm.generation.generate import stream
        from distllm.generation.noise import derive_seed

        with self.engine.sampling() as model:
            yield from stream(
                model,
                prompt_ids,
                self.options,
                end_ids=self.end_ids,
                pad_id=self.pad_id,
                seed=derive_seed(self.seed, turn),
                decode=self.decode,
            )


def load(verb: str, given: Arguments, own: dict[str, str]) -> Speaker:
    """Load what the arguments ask for.

    Raises:
        ConfigError: a setting is wrong, or the model is not one that writes text.
        CheckpointError: the model directory is missing or damaged.
    """
    from distllm.arch.io import load_model
    from distllm.config.checks import machine_problems
    from distllm.config.compose import compose
    from distllm.config.overrides import raise_all
    from distllm.data.chat import end_ids
    from distllm.data.tokenizer import check_fits, load_tokenizer
    from distllm.engines.base import build_engine
    from distllm.engines.hardware import tune_cpu
    from distllm.errors import ConfigError

    short = [f"{SHORT[key]}={value}" for key, value in given.own.items() if key in SHORT]
    config = compose([*given.overrides, *short], also_known=own)
    if config.model is None:
        raise ConfigError(f"`distllm {verb}` needs model=DIR, such as model=RUN/model.")
    raise_all(machine_problems(config))
    tune_cpu(config.hardware)
    model, tokenizer = load_model(config.model, arch=config.arch.name)
    if config.tokenizer:
        tokenizer = load_tokenizer(config.tokenizer)
    if tokenizer is None:
        raise ConfigError(
            f"model={config.model} holds no tokenizer.json. Give one with tokenizer=DIR."
        )
    check_fits(tokenizer, model.options.vocab_size)
    if model.head_name != "lm":
        raise ConfigError(
            f"model={config.model} has the head {model.head_name}: it judges text and writes none. "
            f"`distllm {verb}` needs a language model, such as that of stage=sft."
        )
    engine = build_engine(
        "policy",
        model,
        options=config.engine,
        hardware=config.hardware,
        precision=config.train.precision,
    )
    ids = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    pad_id: Any = next(i for i in ids if i is not None)
    return Speaker(
        engine,
        tokenizer,
        config.generation,
        config.run.seed,
        end_ids(tokenizer),
        pad_id,
    )
