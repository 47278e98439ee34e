"""Generated tasks: every answer checked by code of its own, splits disjoint, corruptions as long as
what they corrupt."""

import importlib
import re

import numpy as np
import pytest

from distllm.data.options import DataOptions
from distllm.data.skill_tasks import TASKS
from distllm.data.skills import exact_match
from distllm.data.source import open_source
from distllm.data.stdlib import read_stdlib
from distllm.data.tokenizer import encode_texts, train_tokenizer
from distllm.errors import ConfigError


def skills(seed=0, **options):
    return open_source(DataOptions(name="skills", **options), seed)


def solve(task, question):
    """Answer a question by reading it, without the generator."""
    _, _, rest = question.partition(": ")
    items = rest.split()
    match task:
        case "copy_words":
            return rest
        case "reverse_words" | "reverse_letters":
            return " ".join(reversed(items))
        case "sort_words" | "sort_digits":
            return " ".join(sorted(items))
        case "first_word":
            return items[0]
        case "last_word":
            return items[-1]
        case "count_letter":
            letter = re.match(r"Count (\w) in", question)[1]
            return str(sum(i == letter for i in items))
        case "largest_number":
            return str(max(int(i) for i in items))
        case "largest_digit":
            return str(max(map(int, items)))
        case "smallest_digit":
            return str(min(map(int, items)))
        case "second_digit":
            return str(sorted(map(int, items))[-2])
        case "letter_after":
            return items[items.index(re.match(r"After (\w) in", question)[1]) + 1]
        case "small_sum":
            return str(int(items[0]) + int(items[2]))
        case "module_of":
            name = re.fullmatch(r"Which module documents (\w+)\?", question)[1]
            [module] = [m for m, n in read_stdlib().definitions if n == name]
            return module


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_every_answer_is_right_and_every_corruption_wrong(split):
    source = skills(num_train=2200, num_heldout=330)
    pairs, dialogues = source.pairs(split), source.dialogues(split)
    prompts = source.prompts(split)[: len(pairs)]
    assert {p.task for p in pairs} == set(TASKS)
    for pair, dialogue, prompt in zip(pairs, dialogues, prompts, strict=True):
        [asked] = pair.prompt
        right = solve(pair.task, asked["content"])
        assert pair.chosen == right == prompt.answer
        assert dialogue.messages == [asked, {"role": "assistant", "content": right}]
        assert prompt.messages == [asked]
        assert pair.rejected != right
        assert len(pair.rejected) == len(right)
        assert pair.kind == "corrupted"
        assert pair.task == prompt.task == dialogue.task


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_modules_really_document_what_they_are_asked_about():
    checked = 0
    for prompt in skills(tasks=["module_of"], num_heldout=40).prompts("heldout"):
        name = prompt.messages[0]["content"].split()[-1].rstrip("?")
        if prompt.answer.startswith(("tkinter", "turtle", "distutils", "idlelib", "curses")):
            continue  # cannot be imported everywhere
        try:
            module = importlib.import_module(prompt.answer)
        except ImportError:
            continue
        value = getattr(module, name, None)
        checked += value is not None and bool(value.__doc__)
    assert checked >= 20


def test_train_and_heldout_share_no_question_over_seeds():
    train, heldout = set(), set()
    for seed in (0, 1):
        source = skills(seed, num_train=1100, num_prompts=5500, num_heldout=220)
        for part, kind in ((train, "train"), (heldout, "heldout")):
            part.update(p.messages[0]["content"] for p in source.prompts(kind))
            part.update(p.prompt[0]["content"] for p in source.pairs(kind))
            part.update(d.messages[0]["content"] for d in source.dialogues(kind))
    assert not train & heldout
    assert len(heldout) > 300


def test_heldout_questions_are_all_different():
    questions = [p.messages[0]["content"] for p in skills(num_heldout=440).prompts("heldout")]
    assert len(set(questions)) == 440


def test_more_records_only_add_to_the_same():
    few = skills(num_train=50, num_prompts=90, num_heldout=30)
    many = skills(num_train=200, num_prompts=300, num_heldout=60)
    assert few.dialogues("train") == many.dialogues("train")[:50]
    assert few.prompts("heldout") == many.prompts("heldout")[:30]
    asked = [p.messages for p in few.prompts("train")]
    assert asked[:50] == [d.messages[:1] for d in few.dialogues("train")]
    assert asked == [p.messages for p in many.prompts("train")[:90]]


def test_seed_decides():
    a, b, c = (skills(seed, num_train=500, num_prompts=500) for seed in (3, 3, 4))
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


def test_tasks_take_turns():
    source = skills(tasks=["small_sum", "copy_words"], num_train=6)
    assert [d.task for d in source.dialogues("train")] == ["small_sum", "copy_words"] * 3


def test_length_tells_little_about_which_answer_is_right(texts):
    """The best rule on token lengths, chosen with hindsight, stays below 60%; so it does for each
    task."""
    tok = train_tokenizer([t for _, t in read_stdlib().documents[:150]], 2000)
    pairs = skills(num_train=5500).pairs("train")
    chosen = encode_texts(tok, [p.chosen for p in pairs])
    rejected = encode_texts(tok, [p.rejected for p in pairs])
    gap = np.array([len(c) - len(r) for c, r in zip(chosen, rejected, strict=True)])
    task = np.array([p.task for p in pairs])

    def best_rule(gaps):
        # For each size of gap the rule may say "the longer one" or "the shorter one"; ties are
        # worth a half.
        right = 0.5 * (gaps == 0).sum()
        for size in np.unique(np.abs(gaps[gaps != 0])):
            right += max((gaps == size).sum(), (gaps == -size).sum())
        return right / len(gaps)

    assert best_rule(gap) < 0.60
    for name in TASKS:
        assert best_rule(gap[task == name]) < 0.65, name


def test_prompts_are_short(texts):
    tok = train_tokenizer([t for _, t in read_stdlib().documents[:150]], 2000)
    prompts = encode_texts(tok, [p.messages[0]["content"] for p in skills().prompts("heldout")])
    assert max(map(len, prompts)) <= 40


def test_refusals():
    with pytest.raises(
        ConfigError, match=r"data\.tasks=copy_word is unknown\. Did you mean copy_words\?"
    ):
        skills(tasks=["copy_word"])
    with pytest.raises(
        ConfigError, match=r"data\.num_heldout=300 .*tasks=small_sum .*heldout_fraction=0\.05"
    ):
        skills(tasks=["small_sum"], num_heldout=300).prompts("heldout")
    with pytest.raises(ConfigError, match=r"data\.num_train=0 must be at least 1"):
        skills(num_train=0)
    with pytest.raises(ConfigError, match=r"data\.heldout_fraction=1\.5"):
        skills(heldout_fraction=1.5)
    with pytest.raises(ConfigError, match=r"heldout_fraction=0 leaves nothing"):
        skills(heldout_fraction=0.0).prompts("heldout")
    with pytest.raises(
        ConfigError, match=r"serves dialogues .* and pairs .* and prompts .*documents"
    ):
        skills().documents("train")


def test_exact_match():
    assert exact_match(" a b\n", "a b")
    assert not exact_match("A b", "a b")
    assert not exact_match("a  b", "a b")
    assert not exact_match("", "a")
