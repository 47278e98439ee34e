"""Every chat template: one tokenisation of the whole dialogue, and a mask of exactly what is said.

The judge works on characters: a turn begins where the text of the prompt before it ends, or else
where its content does, and ends with the first token of the template's own behind the content.
"""

import copy
import random
import re
import warnings
from pathlib import Path

import pytest
from test_chat import KINDS, random_dialogue
from transformers import PreTrainedTokenizerFast

from distllm.data import templates
from distllm.data.chat import encode_answer, encode_dialogue, encode_prompt, end_ids
from distllm.data.datasets import ChatDataset
from distllm.data.templates import TEMPLATES, check_template, set_chat_template
from distllm.data.tokenizer import train_tokenizer
from distllm.errors import ConfigError, DataError
from distllm.types import Dialogue

CONVERSATION = [
    {"role": "system", "content": "Reverse the words."},
    {"role": "user", "content": "one two"},
    {"role": "assistant", "content": "two one"},
    {"role": "user", "content": "A user asks"},
    {"role": "assistant", "content": "asks user A"},
]


def judge(tok, messages):
    """Ids and mask, from the rendered text and the places of tokens in it."""
    text = tok.apply_chat_template(messages, tokenize=False)
    found = tok(text, add_special_tokens=False, return_offsets_mapping=True)
    ids, places = found["input_ids"], found["offset_mapping"]
    special = set(tok.all_special_ids) - {tok.unk_token_id}
    mask, at = [False] * len(ids), 0
    for number, message in enumerate(messages):
        content = message["content"]
        at = text.index(content if content in text[at:] else content.strip(), at)
        if message["role"] == "assistant":
            try:
                before = tok.apply_chat_template(
                    messages[:number], tokenize=False, add_generation_prompt=True
                )
            except Exception:  # some refuse a prompt without a question
                before = "\0"
            start = len(before) if text.startswith(before) and len(before) <= at else at
            end = at + len(content.strip())
            closing = [p for i, p in zip(ids, places, strict=True) if p[0] >= end and i in special]
            nxt = [text.find(m["content"].strip(), end) for m in messages[number + 1 : number + 2]]
            if closing and (not nxt or closing[0][1] <= nxt[0]):
                end = closing[0][1]
            elif number == len(messages) - 1:
                ids, places, mask = [*ids, tok.eos_token_id], [*places, (end, end)], [*mask, True]
            for i, (a, b) in enumerate(places):
                mask[i] = mask[i] or (a < end and b > start)
        at += len(content.strip())
    return ids, mask


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def any_tok(request, texts):
    tok = PreTrainedTokenizerFast(
        tokenizer_object=request.param(texts),
        unk_token="<unk>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    markers = {m for template in TEMPLATES.values() for m in template.markers}
    tok.add_special_tokens({"additional_special_tokens": sorted(markers), "bos_token": "<s>"})
    return tok


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_and_mask_of_every_built_in(any_tok, texts, name):
    set_chat_template(any_tok, name)
    rng = random.Random(0)
    kind = type(any_tok.backend_tokenizer.model).__name__
    for number in range(5):
        messages = random_dialogue(rng, texts) if number else CONVERSATION
        # The judge finds contents by their text.
        unique = [f"{m['content'].strip()} {rng.randint(0, 10**6)}" for m in messages]
        messages = [m | {"content": c} for m, c in zip(messages, unique, strict=True)]
        if kind == "WordPiece" and name in ("alpaca", "vicuna", "raw"):
            messages = [m for m in messages if m["role"] != "system"]
        ids, mask = encode_dialogue(any_tok, messages)
        assert (ids, mask) == judge(any_tok, messages), messages
        ends = [i for i, m in zip(ids, mask, strict=True) if m and i in end_ids(any_tok)]
        assert len(ends) == sum(m["role"] == "assistant" for m in messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompt_and_answer_make_the_dialogue(tok, texts, name):
    """Where prompt and answer meet at a marker or a line end, no token spans the two."""
    own = train_tokenizer(texts, 400)
    own.add_special_tokens(
        {"additional_special_tokens": list(TEMPLATES[name].markers), "bos_token": "<s>"}
    )
    set_chat_template(own, name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_template(own)
    ids, _ = encode_dialogue(own, CONVERSATION)
    parts = encode_prompt(own, CONVERSATION[:-1]) + encode_answer(own, "asks user A")
    if name != "raw":
        assert ids[: len(parts)] == parts


def test_the_judge_is_not_blind(texts, monkeypatch):
    """A mask that leaves out the end of turn, or covers the question, is noticed."""
    own = train_tokenizer(texts, 400)
    right = encode_dialogue(own, CONVERSATION)
    assert judge(own, CONVERSATION) == right
    ids, mask = right
    assert judge(own, CONVERSATION) != (ids, [*mask[:-1], False])
    shifted = [*mask[1:], mask[0]]
    assert judge(own, CONVERSATION) != (ids, shifted)


REFUSING_SYSTEM = {"gemma", "gemma_training"}
SHOWING_NO_TEXT = {  # they take lists of images and texts, never a plain content
    "idefics3", "llava_next", "smolvlm", "idefics3_training", "llava_next_training", "smolvlm_training",
}  # fmt: skip


def test_templates_of_released_models(texts):
    """Their own words, as TRL ships them: ids and mask as the judge sees them."""
    trl = pytest.importorskip("trl")
    files = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    assert len(files) > 20
    spelled = re.compile(
        r"<[|\uff5c][^<>\n]{1,40}[|\uff5c]>|</?s>|<(?:start|end)_of_\w+>|<bos>|\[gMASK\]|<sop>|<turn\|>|<\|turn>|<\|[A-Z_]+\|>"
    )
    tried, fresh = 0, train_tokenizer(texts, 400)
    for file in files:
        if file.stem in SHOWING_NO_TEXT:
            continue
        template = file.read_text()
        own = copy.deepcopy(fresh)
        marks = sorted(set(spelled.findall(template)) - {"<s>", "</s>"})
        own.add_special_tokens(
            {"additional_special_tokens": marks, "bos_token": "<s>", "eos_token": "</s>"}
        )
        own.chat_template = template
        messages = CONVERSATION[1:] if file.stem in REFUSING_SYSTEM else CONVERSATION
        assert encode_dialogue(own, messages) == judge(own, messages), file.stem
        tried += 1
    assert tried > 20


# --- what a template must offer ---


def test_names_and_files(tok, texts, tmp_path):
    own = train_tokenizer(texts, 400)
    with pytest.raises(
        ConfigError, match=r"chatml marks turns with <\|im_start\|>, <\|im_end\|>, wh"
    ):
        set_chat_template(own, "chatml")
    with pytest.raises(
        ConfigError, match=r"chat_template=chatlm is unknown. Did you mean chatml\?.*file"
    ):
        set_chat_template(own, "chatlm")
    assert own.chat_template == tok.chat_template
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}")
    set_chat_template(own, str(file))
    assert own.chat_template == file.read_text()
    own.eos_token = None
    with pytest.raises(ConfigError, match="an eos_token"):
        set_chat_template(own, "raw")


def test_a_template_without_a_generation_prompt_is_refused(texts):
    own = train_tokenizer(texts, 400)
    own.chat_template = (
        "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content + eos_token }}{% endfor %}"
    )
    dialogues = [Dialogue(messages=CONVERSATION)]
    with pytest.raises(
        ConfigError, match=r"no generation prompt: it opens .* with '### assistant:'"
    ):
        ChatDataset(dialogues, own, 200)
    own.chat_template += "{% if add_generation_prompt %}{{ '### assistant: ' }}{% endif %}"
    ChatDataset(dialogues, own, 200)


def test_a_generation_prompt_that_leads_elsewhere_is_said(texts):
    own = train_tokenizer(texts, 400)
    own.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: <think>' }}{% endif %}"
    )
    with pytest.warns(UserWarning, match=r"asks for an answer with '.*<think>' but does not write"):
        ChatDataset([Dialogue(messages=CONVERSATION)], own, 200)


def test_a_template_is_run_in_a_sandbox(texts):
    """A tokenizer comes from anywhere: its template must not reach the machine."""
    own = train_tokenizer(texts, 400)
    own.chat_template = "{{ messages.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(DataError, match=r"refuses the dialogue: .*(unsafe|undefined)"):
        encode_dialogue(own, CONVERSATION)


def test_templates_are_listed_in_the_help():
    from distllm.config.fields import meaning
    from distllm.data.options import DataOptions

    assert all(name in meaning(DataOptions, "chat_template") for name in templates.TEMPLATES)
