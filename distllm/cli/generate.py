"""`distllm generate`: prints samples of a model."""

from collections.abc import Sequence

from distllm.cli import speaker
from distllm.cli.arguments import split

HELP = """
usage: distllm generate model=DIR prompt=TEXT [chat=true] [num_samples=N] [key=value ...]

Continues the prompt, or with chat=true answers it as a user's message. Only what the model writes
is printed.

Examples:
  distllm generate model=runs/demo/pretrain/model prompt="The module os provides" temperature=0.8
  distllm generate model=runs/demo/sft/model prompt="Sort the digits: 3 1 2" chat=true num_samples=4
"""
OWN = {
    "prompt": "the text to continue or to answer",
    "chat": "true: put the prompt into the tokenizer's chat template; false (default): continue it",
    "num_samples": "how many responses to print (default 1)",
} | speaker.OWN

_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def run(arguments: Sequence[str]) -> int:
    """Print the samples; with several, each under a line that says how it ended."""
    given = split("generate", arguments, OWN)
    prompt = given.required("generate", "prompt")
    num_samples = given.integer("num_samples", 1)

    from distllm.data.chat import encode_prompt
    from distllm.data.tokenizer import encode_texts
    from distllm.errors import ConfigError

    chat = given.own.get("chat", "false").lower()
    if chat not in _TRUTH:
        raise ConfigError(f"chat={chat} is neither true nor false. Set chat=true.")
    if num_samples < 1:
        raise ConfigError(f"num_samples={num_samples} must be at least 1. Set num_samples=1.")
    voice = speaker.load("generate", given, OWN)
    if _TRUTH[chat]:
        prompt_ids = encode_prompt(voice.tokenizer, [{"role": "user", "content": prompt}])
    else:
        # The begin-of-sequence token, for a tokenizer that begins with one.
        first = voice.tokenizer("").input_ids[:1]
        starts = first if first == [voice.tokenizer.bos_token_id] else []
        prompt_ids = [*starts, *encode_texts(voice.tokenizer, [prompt])[0]]
    for number, rollout in enumerate(voice.generate(prompt_ids, num_samples), start=1):
        if num_samples > 1:
            length = len(rollout.response_ids)
            print(f"--- {number} of {num_samples} ({length} tokens, {rollout.finish_reason})")
        print(voice.decode(rollout.response_ids))
    return 0
