"""Settings of sampling. Their meaning in arithmetic is in `sampling.py`."""

from dataclasses import dataclass, field

from distllm.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class GenerationOptions:
    """How a response is drawn from the model."""

    max_new_tokens: int = 64
    """Most tokens of a response. A response also ends where the model's context is full."""
    temperature: float = 1.0
    """Divides the logits before the softmax: below 1 sharpens, above 1 flattens, 0 always takes the
    likeliest token."""
    top_k: int = 0
    """Draw among the k likeliest tokens only; 0 draws among all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together hold this probability; 1 draws among all."""
    min_p: float = 0.0
    """Draw among the tokens at least this times as likely as the likeliest one; 0 draws among all."""
    repetition_penalty: float = 1.0
    """Above 1 lowers the logits of tokens that prompt or response hold already (positive ones are divided by it, negative
    ones multiplied); 1 is off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a response as soon as it contains one of them (the text itself is kept)."""


def check_options(options: GenerationOptions) -> None:
    """Refuse settings that have no meaning.

    Raises:
        ConfigError: a value is outside its range; all such values are named.
    """
    problems = []
    if options.max_new_tokens < 1:
        problems.append(
            f"generation.max_new_tokens={options.max_new_tokens} must be at least 1. Set 64."
        )
    if not 0 <= options.temperature < float("inf"):
        problems.append(
            f"generation.temperature={options.temperature} must be 0 (likeliest token) or more. "
            "Set 1.0."
        )
    if options.top_k < 0:
        problems.append(f"generation.top_k={options.top_k} must be 0 (off) or more. Set 0.")
    if not 0 < options.top_p <= 1:
        problems.append(
            f"generation.top_p={options.top_p} must be above 0 and at most 1 (off). Set 1.0."
        )
    if not 0 <= options.min_p < 1:
        problems.append(
            f"generation.min_p={options.min_p} must be at least 0 (off) and below 1. Set 0.05."
        )
    if not 0 < options.repetition_penalty < float("inf"):
        problems.append(
            f"generation.repetition_penalty={options.repetition_penalty} must be above 0; 1 is off. Set 1.1."
        )
    if "" in options.stop:
        problems.append(
            "generation.stop holds an empty text, which every response contains. Remove it."
        )
    if problems:
        raise ConfigError(" ".join(problems))
