"""Rows to records: which columns make which record, and what each must hold.

`FORMS` is the table, most specific first; the first whose columns are all there (and not null)
decides. Other columns are ignored, except that prompts keep them for the reward.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from distllm.data.columns import boolean_of, label_of, number_of, string_of
from distllm.data.graded import read_objectives, read_steps
from distllm.data.messages import (
    check_last,
    check_string,
    is_text,
    learned_messages,
    read_answer,
    read_answers,
    read_messages,
    read_prompt,
    shown,
    split_prompt,
)
from distllm.types import (
    ComparedPair,
    Dialogue,
    Document,
    Labelled,
    Pair,
    Parallel,
    Prompt,
    Record,
    Stepwise,
    Tagged,
    Unpaired,
)

Columns = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Form:
    """Columns that belong together, and the record they make."""

    columns: tuple[str, ...]
    title: str
    record: type
    make: Callable[[Columns], Record]

    @property
    def name(self) -> str:
        """The deciding columns."""
        return "+".join(self.columns)


def forms(text_key: str = "text") -> list[Form]:
    """Return the forms in order of precedence."""
    return [*_FORMS, Form((text_key,), "plain text", Document, lambda row: _text(row, text_key))]


def form_of(row: Any, text_key: str = "text") -> Form | None:
    """Return the form whose columns `row` has, or None if there is none."""
    if not isinstance(row, Mapping):
        return None
    known = forms(text_key)
    filled = {key for key, value in row.items() if value is not None}
    for keys in (filled, row.keys()):
        for form in known:
            if keys >= set(form.columns):
                return form
    return None


def describe_missing(row: Any, text_key: str) -> str:
    """Say why a row has no form."""
    if not isinstance(row, Mapping):
        return f"{shown(row)}, must be an object"
    have = ", ".join(map(str, row)) or "none"
    common = f"{text_key}, messages, prompt+completion, prompt, chosen+rejected, conversations, "
    common += "instruction+output, label+text, tokens+tags, source+target"
    guess = suggest_columns(row)
    hint = ",".join(f"{ours}:{theirs}" for ours, theirs in guess.items()) or "prompt:YOURS,..."
    return f"columns {have}; there must be one of {common}; name yours with data.columns={{{hint}}}"


def suggest_columns(row: Columns) -> dict[str, str]:
    """Guess which columns of a row without form mean what: name of ours -> name in the file."""
    by_name = {str(key).lower(): str(key) for key in row}
    found: dict[str, str] = {}
    for ours, others in _OTHER_NAMES.items():
        theirs = next((by_name[o] for o in (ours, *others) if o in by_name), None)
        if theirs and theirs not in found.values():
            found[ours] = theirs
    for form in forms():
        if found.keys() >= set(form.columns):
            return {column: found[column] for column in form.columns}
    return {}


def content_key(record: Record) -> str:
    """Return what must not be both in training and held out: a text, or what an answer answers."""
    match record:
        case Document():
            return record.text
        case Dialogue():
            return json.dumps(record.messages[:-1] or record.messages)
        case Pair() | Unpaired() | Stepwise():
            return json.dumps(record.prompt)
        case Prompt():
            return json.dumps(record.messages)
        case Labelled():
            return json.dumps(record.texts)
        case Tagged():
            return json.dumps(record.tokens)
        case Parallel():
            return record.source


_OTHER_NAMES = {
    "prompt": ("question", "query", "problem", "instruction", "input", "user"),
    "completion": ("response", "answer", "output", "solution", "assistant", "reply", "responses"),
    "chosen": ("chosen_response", "response_chosen", "preferred", "better"),
    "rejected": ("rejected_response", "response_rejected", "dispreferred", "worse"),
    "messages": ("conversation", "dialog", "dialogue", "chat"),
    "source": ("src", "article", "document"),
    "target": ("tgt", "summary", "highlights"),
    "tokens": ("words",),
    "tags": ("labels", "pos_tags"),
    "label": ("class", "category", "sentiment", "rating"),
    "text": ("content", "body", "raw_content", "review"),
}


def texts_of(record: Record) -> list[str]:
    """Return all that a record of any kind says."""
    match record:
        case Document():
            return [record.text]
        case Labelled():
            return list(record.texts)
        case Tagged():
            return [" ".join(record.tokens)]
        case Parallel():
            return [record.source, record.target]
        case Pair():
            return [*_said(record.prompt), record.chosen, record.rejected]
        case Unpaired():
            return [*_said(record.prompt), record.completion]
        case Stepwise():
            return [*_said(record.prompt), *record.steps]
        case Prompt():
            return [*_said(record.messages), *([record.answer] if record.answer else [])]
    return _said(record.messages)


def _said(messages: list[dict[str, str]]) -> list[str]:
    return [message["content"] for message in messages]


def _text(row: Columns, key: str) -> Document:
    return Document(text=string_of(row, key))


def _pair(row: Columns) -> Pair:
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = _prompt_before(row)
    if not prompt:
        prompt, chosen, rejected = split_prompt(chosen, rejected)
    good = read_answer(prompt, chosen, "chosen")
    bad = read_answer(prompt, rejected, "rejected")
    prompt = _with_system(row, prompt)
    if good == bad:
        raise ValueError(f"chosen and rejected are the same: {good[:50]!r}")
    confidence = number_of(row, "confidence", 1.0)
    if not 0.5 <= confidence <= 1:
        raise ValueError(f"confidence is {confidence:g}, must be from 0.5 to 1")
    return Pair(
        prompt=prompt,
        chosen=good,
        rejected=bad,
        margin=number_of(row, "margin", 0.0),
        confidence=confidence,
        kind=label_of(row, "kind"),
        task=label_of(row, "task"),
    )


def _compared(row: Columns) -> ComparedPair:
    pair = _pair(row)
    values = {f.name: getattr(pair, f.name) for f in fields(pair)}
    return ComparedPair(**values, objectives=read_objectives(row["objectives"]))


def _unpaired(row: Columns, label: str = "label") -> Unpaired:
    prompt = read_prompt(row["prompt"], "prompt")
    completion = read_answer(prompt, row["completion"], "completion")
    good = boolean_of(row, label)
    return Unpaired(prompt=prompt, completion=completion, good=good, task=label_of(row, "task"))


def _tagged_alpaca(row: Columns) -> Unpaired:
    said = _alpaca(row).messages
    good = boolean_of(row, "kto_tag")
    return Unpaired(prompt=said[:-1], completion=said[-1]["content"], good=good)


def _tagged_conversation(row: Columns, key: str) -> Unpaired:
    said = _with_system(row, read_messages(row[key], key))
    check_last(said, key, assistant=True)
    good = boolean_of(row, "kto_tag")
    return Unpaired(prompt=said[:-1], completion=said[-1]["content"], good=good)


def _answered(row: Columns, key: str) -> Prompt:
    return Prompt(
        messages=_with_system(row, read_prompt(row[key], key)),
        answer=string_of(row, "answer"),
        extra=_others(row, key, "answer"),
        task=label_of(row, "task"),
        is_text=is_text(row[key]),
    )


def _prompt_only(row: Columns) -> Prompt:
    return Prompt(
        messages=_with_system(row, read_prompt(row["prompt"], "prompt")),
        extra=_others(row, "prompt"),
        task=label_of(row, "task"),
        is_text=is_text(row["prompt"]),
    )


def _prompt_completion(row: Columns) -> Dialogue:
    prompt = read_prompt(row["prompt"], "prompt")
    answers = read_answers(prompt, row["completion"], "completion")
    before = _with_system(row, prompt)
    learned = None
    if any(m["role"] == "assistant" for m in before):
        places = enumerate(answers, start=len(before))
        learned = [i for i, m in places if m["role"] == "assistant"]
    said, task = [*before, *answers], label_of(row, "task")
    return Dialogue(messages=said, learned=learned, task=task, is_text=is_text(row["prompt"]))


def _conversation(row: Columns, key: str) -> Dialogue:
    messages = read_messages(row[key], key)
    check_last(messages, key, assistant=True)
    learned = learned_messages(row[key], messages)
    with_system = _with_system(row, messages)
    if learned is not None:
        learned = [i + len(with_system) - len(messages) for i in learned]
    return Dialogue(messages=with_system, learned=learned, task=label_of(row, "task"))


def _alpaca(row: Columns) -> Dialogue:
    history = row.get("history") or []
    before = []
    for number, turn in enumerate(history, start=1):
        if not isinstance(turn, list | tuple) or len(turn) != 2:
            raise ValueError(f"history[{number}] is {shown(turn)}, must be a question and answer")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            before.append({"role": role, "content": check_string(text, f"history[{number}]")})
    answer = {"role": "assistant", "content": string_of(row, "output")}
    asked = {"role": "user", "content": _instruction(row)}
    return Dialogue(
        messages=_with_system(row, [*before, asked, answer]), task=label_of(row, "task")
    )


def _labelled(row: Columns, *keys: str) -> Labelled:
    label = row["label"]
    if isinstance(label, bool) or not isinstance(label, str | int | float):
        raise ValueError(
            f"label is {shown(label)}, must be a class (text or whole number) or a number"
        )
    if isinstance(label, float) and not math.isfinite(label):
        raise ValueError(f"label is {label}, must be finite")
    if isinstance(label, str):
        check_string(label, "label")
    pair = [key for key in ("text_pair",) if key in row and keys == ("text",)]
    return Labelled(texts=[string_of(row, key) for key in (*keys, *pair)], label=label)


def _tagged(row: Columns, key: str) -> Tagged:
    tokens, tags = row["tokens"], row[key]
    for name, value in (("tokens", tokens), (key, tags)):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{name} is {shown(value)}, must be a list")
    if len(tokens) != len(tags):
        raise ValueError(f"{len(tokens)} tokens have {len(tags)} {key}")
    words = [check_string(t, f"tokens[{n}]") for n, t in enumerate(tokens, start=1)]
    names = []
    for number, tag in enumerate(tags, start=1):
        if isinstance(tag, bool) or not isinstance(tag, str | int):
            raise ValueError(f"{key}[{number}] is {shown(tag)}, must be a text or a whole number")
        names.append(check_string(str(tag), f"{key}[{number}]"))
    return Tagged(tokens=words, tags=names)


def _parallel(row: Columns) -> Parallel:
    return Parallel(source=string_of(row, "source"), target=string_of(row, "target"))


def _bound(make: Callable[..., Record], *arguments: str) -> Callable[[Columns], Record]:
    return lambda row: make(row, *arguments)


_FORMS = [
    Form(
        ("chosen", "rejected", "objectives"), "pairs compared by objective", ComparedPair, _compared
    ),
    Form(("chosen", "rejected"), "preference pairs", Pair, _pair),
    Form(
        ("prompt", "completions", "labels"), "solutions judged step by step", Stepwise, read_steps
    ),
    Form(("prompt", "completion", "label"), "answers judged good or bad", Unpaired, _unpaired),
    Form(("instruction", "output", "kto_tag"), "Alpaca, judged", Unpaired, _tagged_alpaca),
    Form(
        ("conversations", "kto_tag"),
        "ShareGPT, judged",
        Unpaired,
        _bound(_tagged_conversation, "conversations"),
    ),
    Form(
        ("messages", "kto_tag"),
        "conversations, judged",
        Unpaired,
        _bound(_tagged_conversation, "messages"),
    ),
    Form(("messages", "answer"), "prompts with an answer", Prompt, _bound(_answered, "messages")),
    Form(("prompt", "answer"), "prompts with an answer", Prompt, _bound(_answered, "prompt")),
    Form(("prompt", "completion"), "prompts with a completion", Dialogue, _prompt_completion),
    Form(("messages",), "OpenAI messages", Dialogue, _bound(_conversation, "messages")),
    Form(("conversations",), "ShareGPT", Dialogue, _bound(_conversation, "conversations")),
    Form(("instruction", "output"), "Alpaca", Dialogue, _alpaca),
    Form(("tokens", "tags"), "tagged words", Tagged, _bound(_tagged, "tags")),
    Form(("tokens", "ner_tags"), "tagged words", Tagged, _bound(_tagged, "ner_tags")),
    Form(("label", "text"), "classes of texts", Labelled, _bound(_labelled, "text")),
    Form(("label", "sentence"), "classes of texts", Labelled, _bound(_labelled, "sentence")),
    *(
        Form(("label", *two), "classes of two texts", Labelled, _bound(_labelled, *two))
        for two in (("sentence1", "sentence2"), ("premise", "hypothesis"))
    ),
    Form(("source", "target"), "texts and what they become", Parallel, _parallel),
    Form(("prompt",), "prompts", Prompt, _prompt_only),
]


def _prompt_before(row: Columns) -> list[dict[str, str]]:
    """Return what comes before a pair's answers; empty if it is inside them."""
    for key in ("prompt", "messages", "conversations"):
        if row.get(key) is not None:
            return read_prompt(row[key], key)
    if row.get("instruction") is not None:
        return [{"role": "user", "content": _instruction(row)}]
    return []


def _instruction(row: Columns) -> str:
    """Join an Alpaca instruction with its input, if it has one."""
    extra = row.get("input")
    asked = string_of(row, "instruction")
    return f"{asked}\n{string_of(row, 'input')}" if extra not in (None, "") else asked


def _with_system(row: Columns, messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """Put the `system` column before messages that bring no system prompt of their own."""
    system = row.get("system")
    if not system or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": check_string(system, "system")}, *messages]


def _others(row: Columns, *used: str) -> dict[str, Any]:
    """Return the columns that a record has no field for."""
    return {k: v for k, v in row.items() if k not in (*used, "task", "system")}
