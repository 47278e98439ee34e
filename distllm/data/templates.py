"""Chat templates by name, for tokenizers that bring none, and what every template must offer.

Where a template's turns are marked by tokens of its own, the tokenizer must have them: spelled out
in plain text anyone could type them.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakSet

from distllm.data.chat import encode_answer, encode_dialogue, encode_prompt
from distllm.data.rendering import render
from distllm.errors import ConfigError, DataError
from distllm.registry import unknown_name

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(frozen=True, slots=True)
class Template:
    """A chat template in Jinja and the tokens it cannot do without."""

    text: str
    markers: tuple[str, ...] = ()


def _turns(before: str, after: str, prompt: str, start: str = "") -> str:
    """Write a template whose turns all look alike; `before` and `after` are Jinja expressions."""
    return (
        f"{start}{{%- for message in messages -%}}{{{{- {before} + message['content'] + {after} -}}}}"
        f"{{%- endfor -%}}{{%- if add_generation_prompt -%}}{{{{- {prompt} -}}}}{{%- endif -%}}"
    )


def _inst(system: str, answer: str) -> str:
    """Write a template of `[INST] question [/INST] answer`; a system prompt joins the first question."""
    return (
        "{{- bos_token or '' -}}"
        "{%- if messages[0]['role'] == 'system' -%}{%- set rest = messages[1:] -%}"
        f"{{%- set system = {system} -%}}"
        "{%- else -%}{%- set rest = messages -%}{%- set system = '' -%}{%- endif -%}"
        "{%- for message in rest -%}{%- if message['role'] == 'assistant' -%}"
        f"{{{{- {answer} + eos_token -}}}}"
        "{%- else -%}{{- '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}"
        "{%- endif -%}{%- endfor -%}"
    )


_BOS = "{{- bos_token or '' -}}"
_ROLE_IN_BARS = "'<|' + message['role'] + '|>\\n'"
_END = "(eos_token if message['role'] == 'assistant' else {})"

TEMPLATES = {
    "chatml": Template(
        _turns(
            "'<|im_start|>' + message['role'] + '\\n'",
            "'<|im_end|>\\n'",
            "'<|im_start|>assistant\\n'",
        ),
        ("<|im_start|>", "<|im_end|>"),
    ),
    "llama3": Template(
        _turns(
            "'<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'",
            "'<|eot_id|>'",
            "'<|start_header_id|>assistant<|end_header_id|>\\n\\n'",
            _BOS,
        ),
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    ),
    "llama2": Template(
        _inst(
            "'<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n'",
            "' ' + message['content'] + ' '",
        )
    ),
    "mistral": Template(_inst("messages[0]['content'] + '\\n\\n'", "' ' + message['content']")),
    "gemma": Template(
        _turns(
            "'<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
            "message['role']) + '\\n'",
            "'<end_of_turn>\\n'",
            "'<start_of_turn>model\\n'",
            _BOS,
        ),
        ("<start_of_turn>", "<end_of_turn>"),
    ),
    "phi3": Template(
        _turns(_ROLE_IN_BARS, "'<|end|>\\n'", "'<|assistant|>\\n'"),
        ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
    ),
    "zephyr": Template(
        _turns(_ROLE_IN_BARS, "eos_token + '\\n'", "'<|assistant|>\\n'"),
    ),
    "alpaca": Template(
        _turns(
            "{'user': '### Instruction:\\n', 'assistant': '### Response:\\n'}"
            ".get(message['role'], '')",
            _END.format("'\\n\\n'"),
            "'### Response:\\n'",
        )
    ),
    "vicuna": Template(
        _turns(
            "{'user': 'USER: ', 'assistant': 'ASSISTANT: '}.get(message['role'], '')",
            _END.format("' '"),
            "'ASSISTANT:'",
        )
    ),
    "raw": Template(_turns("''", _END.format("''"), "''")),
}
"""Name -> template. `raw` writes nothing but the contents and the end of text: prompt and completion
are joined as they are."""

_checked: WeakSet = WeakSet()


def set_chat_template(tok: PreTrainedTokenizerFast, name: str) -> None:
    """Give `tok` the template that `name` names: one of `TEMPLATES`, or a file.

    Raises:
        ConfigError: there is no such template, or the tokenizer lacks one of its tokens.
    """
    if name in TEMPLATES:
        template = TEMPLATES[name]
        lacking = [m for m in template.markers if m not in tok.get_vocab()]
        if "eos_token" in template.text and tok.eos_token is None:
            lacking.append("an eos_token")
        if lacking:
            raise ConfigError(
                f"data.chat_template={name} marks turns with {', '.join(lacking)}, which this "
                f"tokenizer lacks. Set one that needs no tokens (alpaca, vicuna, raw), or a "
                "tokenizer that has them."
            )
        tok.chat_template = template.text
    elif Path(name).is_file():
        tok.chat_template = Path(name).read_text(encoding="utf-8")
    else:
        raise ConfigError(f"{unknown_name('data.chat_template', name, TEMPLATES)} Or name a file.")


def check_template(tok: PreTrainedTokenizerFast) -> None:
    """Try the chat template on a short dialogue, once per tokenizer.

    Warns where what is learned begins otherwise than what the generation prompt asks for.

    Raises:
        ConfigError: a turn of the assistant begins with words that no generation prompt writes.
    """
    if tok in _checked or tok.chat_template is None:
        return
    ask = [{"role": "user", "content": "a"}]
    said = [*ask, {"role": "assistant", "content": "b"}]
    try:
        spans = render(tok, said, add_generation_prompt=False)
        ids, _ = encode_dialogue(tok, said)
        prompt = encode_prompt(tok, ask)
        joined = prompt + encode_answer(tok, "b")
        bare = render(tok, ask, add_generation_prompt=False)
    except DataError:
        return  # the dialogues themselves will tell
    _checked.add(tok)
    asked = "".join(span.text for span in render(tok, ask, add_generation_prompt=True))
    opening = "".join(span.text for span in spans if span.leads).strip()
    asks_nothing = asked == "".join(span.text for span in bare)
    if asks_nothing and not opening:
        return  # the tokens where the two texts meet may differ, but nothing is asked for that is not learned
    if asks_nothing:
        raise ConfigError(
            f"The chat template has no generation prompt: it opens the assistant's turn with "
            f"{opening!r} but ignores add_generation_prompt, so a model would have to write that "
            "itself. Add {% if add_generation_prompt %} to it, or set data.chat_template."
        )
    if ids[: len(joined)] != joined:
        shown = tok.decode(prompt)[-40:]
        warnings.warn(
            f"The chat template asks for an answer with {shown!r} but does not write that before "
            "the answers of a dialogue: answers are learned without it and sampled after it.",
            stacklevel=2,
        )
